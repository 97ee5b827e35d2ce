"""Fine-tuning speed on this machine: fledge against TRL's SFTTrainer and plain loops, on the same conversations.

    python benchmarks/sft.py [--quick]

SmolLM2-135M, all weights, bf16 autocast over fp32 weights, fused AdamW at 2e-5, the loss on the assistant's turns only,
real conversations between a handful and a thousand tokens long. Every side gets the same token ids and labels, about
2,048 tokens a step, and sees each conversation once:

- fledge: as `train.sft` does it, conversations laid end to end and kept apart, a micro-batch of about 1,024 tokens,
  layers compiled as in any run that is long enough;
- TRL packed: SFTTrainer with its packing (best-fit decreasing, two rows of 1,024), no gradient checkpointing;
- TRL padded: four conversations a step, padded;
- plain loop: four conversations a step, one at a time (no padding, and faster than four padded ones), forward with
  labels, backward, clip, step; and the same with bf16 weights.

Speed counts the tokens of conversations, not padding, in the steps after the first. Checked: on one packed batch of
TRL's the losses in fp32 agree to 1e-5, and after the same tokens the held-out losses, measured by one program, agree
within 1 %. TRL lives in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import material
import peers

FOLDER = peers.HOME / "sft"
LENGTH, ROWS, LR = 1024, 2, 2e-5
TRL = ("torch==2.13.0", "trl>=1.16", "transformers<5.24", "peft", "datasets")


def prepare() -> None:
    """The model as a folder, and conversations as token ids with labels, made once."""
    if (FOLDER / "rows.json").is_file():
        return
    runs = material.smollm2()
    from fledge.core.artifact import Conversations
    from fledge.data.tokens.batches import permutation
    from fledge.records import shards
    from fledge.records.chat import ChatRenderer

    renderer = ChatRenderer.from_folder(runs / "base")
    found = [renderer.render(row.messages) for row in shards.read(Conversations(runs / "talk"), "conversations")]
    rows = [(r.ids[:LENGTH], r.weights[:LENGTH]) for r in found if any(r.weights[1:LENGTH])]
    rows = [rows[index] for index in permutation(len(rows), 0)]
    (FOLDER / "rows.json").write_text(json.dumps({"held_out": rows[:40], "train": rows[40:]}))
    print(f"{len(rows)} conversations of {min(len(r[0]) for r in rows)} to {max(len(r[0]) for r in rows)} tokens")


def conversations(name: str, count: int | None = None) -> list[tuple[list[int], list[float]]]:
    return json.loads((FOLDER / "rows.json").read_text())[name][:count]


def labelled(row: tuple[list[int], list[float]]) -> dict[str, list[int]]:
    ids, weights = row
    labels = [-100, *(i if w > 0 else -100 for i, w in zip(ids[1:], weights[1:], strict=True))]
    return {"input_ids": ids, "labels": labels}


def smollm2(dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(material.smollm2() / "base", dtype=getattr(torch, dtype))


class Clock:
    """Tokens and seconds of the steps after the first, in which things are compiled and allocated."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def tick(self, tokens: int) -> None:
        self.ends.append(time.perf_counter())
        self.tokens.append(tokens)

    @property
    def rate(self) -> float:
        return sum(self.tokens[1:]) / (self.ends[-1] - self.ends[0])


def fledge(rows: list[Any], clock: Clock) -> Any:
    import numpy as np

    from fledge.core.events import Emitter
    from fledge.data.tokens.batches import ConversationBatches
    from fledge.records.chat import Rendered
    from fledge.training.compiling import compile_layers, has_compiler
    from fledge.training.objectives.chat import Chat
    from fledge.training.settings import TrainSettings
    from fledge.training.trainer import Trainer

    model = smollm2()
    if has_compiler():
        compile_layers(model, FOLDER / "cache", varying=True)
    size = max(1, round(len(rows) * ROWS * LENGTH / sum(len(ids) for ids, _ in rows)))
    batches = ConversationBatches([Rendered(*row) for row in rows], size, LENGTH, 0, 0, row_tokens=LENGTH)

    class Watched:
        """A step has ended when the next one asks for its batch."""

        tokens = 0

        def batch(self, step: int) -> Any:
            if step:
                clock.tick(self.tokens)
            found = batches.batch(step)
            self.tokens = int(np.sum([len(batches.rows[i].ids) for i in batches._epoch(0)[step % len(batches)]]))
            return found

    source = Watched()
    settings = TrainSettings(lr=LR, schedule="constant", warmup=0, weight_decay=0, betas=(0.9, 0.999), log_every=1,
                             rollbacks=0)  # fmt: skip
    Trainer(Chat(), {"model": model}, source, settings, len(batches), 0, Emitter("bench", 0, lambda event: None),
            micro_batch=1).fit()  # fmt: skip
    clock.tick(source.tokens)
    return model


def trl(rows: list[Any], clock: Clock, packed: bool = True) -> Any:
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watched(SFTTrainer):
        seen = 0

        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.seen = int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *rest, **more)

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock.tick(trainer.seen)

    tokenizer = AutoTokenizer.from_pretrained(material.smollm2() / "base")
    arguments = SFTConfig(
        output_dir=str(FOLDER / "trl"), per_device_train_batch_size=ROWS if packed else 2 * ROWS, num_train_epochs=1,
        max_length=LENGTH, packing=packed, bf16=True, use_cpu=True, optim="adamw_torch_fused", learning_rate=LR,
        lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    data = datasets.Dataset.from_list([labelled(row) for row in rows])
    trainer = Watched(smollm2(), arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Ticks()])
    trainer.train()
    return trainer.model


def plain_loop(rows: list[Any], clock: Clock, dtype: str = "float32") -> Any:
    import torch

    model = smollm2(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0, fused=True)
    for start in range(0, len(rows), 2 * ROWS):
        made = [{k: torch.tensor([v]) for k, v in labelled(row).items()} for row in rows[start : start + 2 * ROWS]]
        targets = [int((one["labels"] != -100).sum()) for one in made]
        for one, count in zip(made, targets, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "float32"):
                loss = model(**one, use_cache=False).loss * (count / sum(targets))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(sum(one["input_ids"].numel() for one in made))
    return model


SIDES: dict[str, Callable[[list[Any], Clock], Any]] = {
    "fledge": fledge,
    "TRL packed": trl,
    "TRL padded": lambda rows, clock: trl(rows, clock, packed=False),
    "plain loop": plain_loop,
    "plain loop, bf16 weights": lambda rows, clock: plain_loop(rows, clock, "bfloat16"),
}


def one_side(name: str, count: int, save: str) -> None:
    """Run one side, print its speed and leave its weights in a folder."""
    clock = Clock()
    model = SIDES[name](conversations("train", count), clock)
    model.save_pretrained(save)
    print(json.dumps({"tokens_per_second": clock.rate, "steps": len(clock.ends), "tokens": sum(clock.tokens)}))


def first_loss(side: str) -> None:
    """The loss of one packed batch in fp32, as the trainer of that side computes it."""
    import torch

    batch = torch.load(FOLDER / "packed.pt", weights_only=True) if side == "fledge" else None
    if side == "fledge":
        from fledge.training.kernels import fast_kernels
        from fledge.training.objectives.chat import Chat

        model = smollm2()
        kept = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
        with fast_kernels([model], "cpu"), torch.no_grad():
            term = Chat().loss(Chat().forward({"model": model}, kept), kept)["nll"]
        print(float(term.sum / term.weight))
        return
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(FOLDER / "trl"), per_device_train_batch_size=ROWS, max_length=LENGTH, packing=True,
        bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(material.smollm2() / "base")
    data = datasets.Dataset.from_list([labelled(row) for row in conversations("train", 12)])
    trainer = SFTTrainer(smollm2(), arguments, train_dataset=data, processing_class=tokenizer)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    torch.save({k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}, FOLDER / "packed.pt")
    with torch.no_grad():
        print(float(trainer.compute_loss(trainer.model, batch)))


def held_out_loss(folder: str) -> float:
    """Mean −log p of the held-out targets under a saved model, in fp32, one conversation at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in conversations("held_out"):
        made = {name: torch.tensor([values]) for name, values in labelled(row).items()}
        targets = int((made["labels"] != -100).sum())
        with torch.no_grad():
            total += float(model(**made).loss) * targets
        count += targets
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the conversations")
    for hidden in ("--side", "--save", "--first-loss"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return one_side(args.side, args.count, args.save)
    if args.first_loss:
        return first_loss(args.first_loss)
    prepare()
    count = args.count or (16 if args.quick else 48)
    theirs = peers.environment("trl", *TRL)
    python = {name: theirs if name.startswith("TRL") else sys.executable for name in SIDES}
    firsts = [float(peers.measure([interpreter, __file__, "--first-loss", name]).output.splitlines()[-1])
              for name, interpreter in (("trl", theirs), ("fledge", sys.executable))]  # fmt: skip
    print(f"first loss of one packed batch, fp32: TRL {firsts[0]:.7f}, fledge {firsts[1]:.7f}", flush=True)
    speeds, losses, memory = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            save = str(Path(folder) / side.replace(" ", "-"))
            run = peers.measure([python[side], __file__, "--side", side, "--count", str(count), "--save", save])
            found = json.loads(run.output.splitlines()[-1])
            speeds[side], memory[side], losses[side] = found["tokens_per_second"], run.peak_bytes, held_out_loss(save)
            print(f"{side}: {speeds[side]:,.0f} tokens/s over {found['tokens']} tokens in {found['steps']} steps, "
                  f"{memory[side] / 1e9:.2f} GB, held-out loss {losses[side]:.4f}", flush=True)  # fmt: skip
    print(f"memory of TRL packed: {memory['fledge'] / memory['TRL packed']:.2f}×")
    equal = abs(firsts[0] - firsts[1]) < 1e-5 and abs(losses["fledge"] / losses["TRL packed"] - 1) < 0.01
    ours = speeds.pop("fledge")
    print(", ".join(f"{ours / value:.2f}× {name}" for name, value in speeds.items()))
    peers.conclude("sft", "tokens/s", ours, {k: v for k, v in speeds.items() if k.startswith("TRL")}, equal)


if __name__ == "__main__":
    main()
