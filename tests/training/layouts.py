"""What every process of the layout tests does: train each case under its layout and write down what came of it.

python -m tests.training.layouts RANK WORLD FOLDER CASE…
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from fledge.core.events import Emitter, Event
from fledge.core.stage import LAYOUTS, Layout
from fledge.training.layout.ranks import Ranks
from fledge.training.objectives.causal_lm import CausalLM
from fledge.training.objectives.dpo import DPO
from fledge.training.strategies.penalty import ElasticWeights
from fledge.training.trainer import Trainer
from tests.training.toys import Pairs, settings

VOCAB = 64


@dataclass(frozen=True)
class Case:
    """A model, a layout, and what is particular about the run."""

    layout: Any
    family: str = "llama"
    tied: bool = False
    lora: bool = False
    z_loss: float = 0.0
    micro_batch: int = 0
    layers: int = 2
    rows: int = 6
    rounding: int = 1
    """how much coarser than fp32 the arithmetic is (muon's is bf16)"""
    vocab: int = VOCAB
    objective: str = "causal"
    settings: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    resumed: bool = False
    """the weights are those of a second run, which goes on from the first one's checkpoint"""
    elastic: float = 0.0
    """strength of an EWC penalty"""
    window: int | None = None
    """how many tokens back a layer of Mistral sees"""
    padded: bool = False
    """rows are texts of several lengths with padding behind them, instead of packed ones"""
    length: int = 15
    sources: tuple[str, ...] = ()
    """what the tokens come from; each has a loss of its own"""

    @property
    def layouts(self) -> Layout:
        return Layout(**(LAYOUTS[self.layout] if isinstance(self.layout, str) else self.layout))


class Rows:
    """Packed rows with uneven masks: some rows have two labels, one has none. The length is odd."""

    def __init__(self, case: Case) -> None:
        self.rows, self.length, self.vocab, self.padded = case.rows, case.length, case.vocab, case.padded
        self.sources = case.sources

    def batch(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([3, step])
        ids = rng.integers(0, self.vocab, (self.rows, self.length))
        labels = ids.copy()
        for row in range(self.rows - 1):
            labels[row, 3 * row :] = -100
        if self.padded:
            mask = np.arange(self.length) < rng.integers(1, self.length + 1, (self.rows, 1))
            return {"input_ids": ids, "labels": np.where(mask, labels, -100), "attention_mask": mask.astype(np.int64)}
        positions = np.tile(np.arange(self.length), (self.rows, 1))
        for row, start in enumerate(rng.integers(4, self.length - 4, self.rows)):
            positions[row, start:] -= start
        found = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {**found, "source": rng.integers(0, 2, ids.shape)} if self.sources else found


def model_of(case: Case) -> Any:
    """A tiny model of the case's family, the same in every process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": case.vocab, "tie_word_embeddings": case.tied, "bos_token_id": 0, "eos_token_id": 0}
    if case.family == "gpt2":
        own = {"n_embd": 32, "n_layer": case.layers, "n_head": 4, "n_positions": 32,
               "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip
    else:
        own = {"hidden_size": 32, "num_hidden_layers": case.layers, "num_attention_heads": 4, "intermediate_size": 48,
               "num_key_value_heads": 4 if case.family == "mistral" else 2, "head_dim": 8,
               "max_position_embeddings": 32}  # fmt: skip
        own |= {"sliding_window": case.window} if case.family == "mistral" else {}
        if case.family == "llama":
            own["num_key_value_heads"] = 4
    torch.manual_seed(7)
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.family, **common, **own))
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms that are not their beginnings
            parameter.add_(0.02 * torch.randn_like(parameter))
    if case.lora:
        from fledge.models.adapters import LoRA, add_lora

        made = add_lora(made, LoRA(rank=4, alpha=8), 5)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    return made


def train(case: Case, ranks: Ranks, folder: Path | None = None) -> tuple[dict[str, list[float]], Any]:
    """The curves of a short run, and the model after it. Checkpoints go into `folder`."""
    model, heard = model_of(case), list[Event]()
    objective: Any = CausalLM(case.z_loss) if case.objective == "causal" else DPO(0.1)
    source: Any = Rows(case)
    if case.objective == "dpo":
        source = _WithReference()
    values = {"lr": 1e-2, "grad_clip": 0.5, "eps": 1e-4, "warmup": 0, "checkpoint_every": 1, **case.settings}
    trainer = Trainer(
        objective, {"model": model}, source, settings(**values), 2, 5, Emitter("t", 0, heard.append),
        micro_batch=case.micro_batch, ranks=ranks, activation_checkpointing=case.checkpointing,
        checkpoints=folder,
    )  # fmt: skip
    if case.elastic:
        fisher = {f"model.{key}": torch.rand(p.shape, generator=torch.Generator().manual_seed(number))
                  for number, (key, p) in enumerate(model.named_parameters())}  # fmt: skip
        trainer.penalties = [ElasticWeights(case.elastic, fisher)]
    goes_on = folder is not None and folder.exists()
    trainer.fit()
    told = [str(event.value) for event in heard if event.kind == "message"]
    assert (ranks.rank == 0 and "going on after step 1" in told) == (goes_on and ranks.rank == 0), told
    curves: dict[str, list[float]] = {}
    for event in heard:
        known = ("nll", "loss", "grad_norm", "dpo", "l2_sp", "ewc", *(f"loss/{name}" for name in case.sources))
        if event.kind == "metric" and event.name in known:
            curves.setdefault(event.name, []).append(float(event.value))
    return curves, model


class _WithReference:
    def batch(self, step: int) -> dict[str, Any]:
        return {**Pairs().batch(step), "reference": np.full((4, 2), -40.0)}


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Every weight once, by name."""
    return {name: parameter.detach().clone().contiguous() for name, parameter in model.named_parameters()}


# --- whole stages ----------------------------------------------------------------------------------------------------

STAGES: dict[str, Any] = {
    "stage-fsdp-tp": ("pretrain", {"replicate": 1, "shard": 2, "tensor": 2}),
    "stage-pp-fsdp": ("pretrain", {"pipeline": 2, "replicate": 1, "shard": 2}),
    "stage-lora": ("sft", "zero3"),
    "stage-ctx-lora": ("sft", {"context": 2}),
}


def inputs(folder: Path) -> None:
    """A tokenizer, texts, conversations and a model in `folder`, for the stages."""
    from fledge.models.build import build_model
    from fledge.models.save import save_model
    from fledge.models.shape import ModelShape
    from fledge.records.kinds import Conversation, Document, Message
    from fledge.records.shards import ShardWriter
    from tests.training.toys import tokenizer

    names = tokenizer()
    names.save_pretrained(folder / "tokenizer")
    with ShardWriter(folder / "texts", "documents") as shards:
        for i in range(40):
            shards.write(Document("hello there you are here 你好人民法院。 " * (2 + i % 4)))
    with ShardWriter(folder / "chats", "conversations") as shards:
        for i in range(12):
            shards.write(
                Conversation((Message("user", f"who {i}"), Message("assistant", "你好 there" + " are" * (i % 5))))
            )
    shape = ModelShape(hidden=32, layers=2, head_dim=8, kv_heads=2, context=128).resolve(len(names))
    save_model(build_model(shape, 3, names), names, folder / "base")


def stage(name: str, layout: Any, folder: Path, out: Path, rank: int = 0, world: int = 1) -> Any:
    """Carry out a training stage as the runner would have this process do it."""
    from fledge.core.artifact import Conversations, Documents, Model, Tokenizer
    from fledge.core.job import Job
    from fledge.core.stage import Execution
    from fledge.training.stages import SFT, Pretrain

    train = {"dtype": "float32", "optimizer": "adamw", "batch_size": 6, "checkpoint_every": 2, "evaluate_every": 2,
             "patience": 3, "log_every": 1, "lr": 1e-3, "eps": 1e-4, "statistics_every": 2}  # fmt: skip
    asked: Any = Pretrain(
        data=["texts"], tokenizer="tokenizer", tokens=6 * 33 * 4, seq_len=33, held_out={"en": "texts"},
        held_out_bytes=600, model={"hidden": 32, "layers": 4, "head_dim": 8, "kv_heads": 2, "context": 64}, train=train,
    )  # fmt: skip
    if name == "sft":
        asked = SFT(model="base", data=["chats"], held_out="chats", held_out_rows=6, lora={"rank": 4},
                    train={**train, "steps": 4, "max_length": 48})  # fmt: skip
    given = {"texts": Documents(folder / "texts"), "chats": Conversations(folder / "chats"),
             "tokenizer": Tokenizer(folder / "tokenizer"), "base": Model(folder / "base")}  # fmt: skip
    (out / "work").mkdir(parents=True, exist_ok=True)
    execution = Execution(processes=world, layout=layout, device="cpu", micro_batch=2)
    events = Emitter(name, 0, lambda event: None)
    job = Job(name, out / "out", out / "work", 0, execution, events, given, rank=rank, world=world)
    return asked.run(job)


def main(rank: int, world: int, folder: Path, names: list[str]) -> None:
    """Run the named cases, one after another, in one process group."""
    from fledge.training.layout import check
    from tests.training import test_layouts

    check.CONTEXT_DEVICES.add("cpu")  # refused to users, who would gain nothing; the arithmetic is the same
    torch.set_num_threads(1)
    os.environ["FLEDGE_HOME"] = str(folder / "home")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for name in names:
        began = time.monotonic()
        try:
            if name in STAGES:
                made = stage(*STAGES[name], folder, folder / name, rank, world)
                if rank == 0:
                    told = {"metrics": made.metrics, "seconds": time.monotonic() - began}
                    (folder / f"{name}.json").write_text(json.dumps(told, default=str), encoding="utf-8")
                continue
            case = test_layouts.CASES[name]
            ranks, checkpoints = Ranks.join(rank, world, "cpu", case.layouts), folder / f"{name}-checkpoints"
            curves, model = train(case, ranks, checkpoints if case.resumed else None)
            if case.resumed:
                model = train(case, ranks, checkpoints)[1]
        except Exception:
            (folder / f"{name}-{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
            print(traceback.format_exc(), flush=True)
            os._exit(1)
        if rank == 0:
            save_file(weights_of(model), folder / f"{name}.safetensors")
            told = {"curves": curves, "seconds": time.monotonic() - began}
            (folder / f"{name}.json").write_text(json.dumps(told), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
