"""Pre-training speed on this machine: fledge's Trainer, transformers' Trainer and a plain loop, on the same batches.

    python benchmarks/pretrain.py [--quick]

A LLaMA of 33 M parameters (512 wide, 8 layers, 16,384 entries, tied), rows of 512 tokens, 8 rows a step, AdamW, bf16
autocast over fp32 weights on all three sides: the same precision recipe. The peers have the best settings found for
them: transformers' Trainer a fused AdamW, no cache, no logging and torch.compile where it helps (both are run); the
plain loop is what one writes by hand (forward with labels, backward, clip, step). Each side starts from the same
weights, sees the same batches in the same order and reports its losses, which must agree; the speed is that of the
steps after the third, when everything is compiled and warm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import conclude, measure

ROWS, LENGTH, VOCABULARY, WARM = 8, 512, 16_384, 3
SIDES = ("fledge", "transformers", "transformers, compiled", "plain loop")


def model() -> Any:
    """The same fresh weights on every side."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
            num_attention_heads=8, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        )
    )  # fmt: skip


def batch(step: int) -> Any:
    """(ROWS, LENGTH) token ids with something to learn: a walk whose next step depends on the last."""
    rng = np.random.default_rng(step)
    return (rng.zipf(1.5, (ROWS, LENGTH)).cumsum(axis=1) * 7919 % VOCABULARY).astype(np.int64)


class Clock:
    """The time at which each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    @property
    def tokens_per_second(self) -> float:
        """From the median of the steps after the first few."""
        steps = np.diff(self.times)[WARM - 1 :]
        return ROWS * LENGTH / float(statistics.median(steps))


def fledge(steps: int, cache: Path) -> tuple[list[float], float]:
    from fledge.core.events import Emitter, Event
    from fledge.training.compiling import compile_layers, has_compiler
    from fledge.training.objectives.causal_lm import CausalLM
    from fledge.training.settings import TrainSettings
    from fledge.training.trainer import Trainer

    clock, losses = Clock(), list[float]()

    class Source:
        def batch(self, step: int) -> dict[str, Any]:
            clock.tick()  # a step begins where the one before has ended
            ids = batch(step)
            return {"input_ids": ids, "labels": ids}

    def hear(event: Event) -> None:
        if event.kind == "metric" and event.name == "nll":
            losses.append(float(event.value))

    made = model()
    if has_compiler():
        compile_layers(made, cache)
    settings = TrainSettings(lr=1e-3, schedule="constant", warmup=0, weight_decay=0.1, log_every=1, rollbacks=0)
    Trainer(CausalLM(), {"model": made}, Source(), settings, steps, 0, Emitter("bench", 0, hear)).fit()
    return losses, clock.tokens_per_second


def transformers(steps: int, cache: Path, compiled: bool = False) -> tuple[list[float], float]:
    import torch
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rows(Dataset):
        def __len__(self) -> int:
            return steps * ROWS

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = torch.from_numpy(batch(index // ROWS)[index % ROWS])
            return {"input_ids": ids, "labels": ids}

    clock, losses = Clock(), list[float]()

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **rest: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    made = model()
    made.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=str(cache / "transformers"), per_device_train_batch_size=ROWS, max_steps=steps, bf16=True,
        use_cpu=True, optim="adamw_torch_fused", learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1,
        adam_beta2=0.95, max_grad_norm=1.0, logging_steps=1, logging_nan_inf_filter=False, save_strategy="no",
        report_to=[], disable_tqdm=True, torch_compile=compiled, dataloader_pin_memory=False,
    )  # fmt: skip
    InOrder(made, arguments, train_dataset=Rows(), callbacks=[Watch()]).train()
    return losses, clock.tokens_per_second


def plain_loop(steps: int, cache: Path) -> tuple[list[float], float]:
    import torch

    made = model().train()
    decayed = [p for p in made.parameters() if p.ndim == 2]
    others = [p for p in made.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    clock, losses = Clock(), list[float]()
    for step in range(steps):
        ids = torch.from_numpy(batch(step))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = made(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        clock.tick()
    return losses, clock.tokens_per_second


def one_side(name: str, steps: int) -> None:
    """Run one side and print its losses and speed."""
    with tempfile.TemporaryDirectory() as folder:
        run = {
            "fledge": fledge, "transformers": transformers, "plain loop": plain_loop,
            "transformers, compiled": lambda steps, cache: transformers(steps, cache, compiled=True),
        }[name]  # fmt: skip
        losses, speed = run(steps, Path(folder))
    print(json.dumps({"losses": losses, "tokens_per_second": speed}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps = args.steps or (8 if args.quick else 16)
    if args.side:
        one_side(args.side, steps)
        return
    speeds, curves, memory = {}, {}, {}
    for side in SIDES:
        run = measure([sys.executable, __file__, "--side", side, "--steps", str(steps)])
        found = json.loads(run.output.splitlines()[-1])
        speeds[side], curves[side], memory[side] = found["tokens_per_second"], found["losses"], run.peak_bytes
        print(f"{side}: {speeds[side]:,.0f} tokens/s, {memory[side] / 1e9:.2f} GB, losses {curves[side][0]:.4f} … "
              f"{curves[side][-1]:.4f}", flush=True)  # fmt: skip
    ours = np.array(curves["fledge"])
    equal = all(np.allclose(ours, np.array(curve), rtol=1e-2) for curve in curves.values())
    conclude("pretrain", "tokens/s", speeds.pop("fledge"), speeds, equal)


if __name__ == "__main__":
    main()
