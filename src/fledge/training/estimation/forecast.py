"""Predicted against measured: what a training will take, said after its first step and its first twenty, and what it
took. Kept in the artifact's metrics.

Memory is predicted from the models, the settings and the largest of the first twenty batches (of the first epoch, where
their source knows it), on top of what the process held before; time from the pace of these steps. Both are measured:
the process's resident memory (PyTorch's own count on a card), and the clock.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fledge.core.allocator import give_back
from fledge.core.language import t
from fledge.core.units import show_bytes, show_seconds
from fledge.training.estimation.memory import CPU, NOTHING, memory_of
from fledge.training.estimation.network import Network
from fledge.training.estimation.plan import Plan
from fledge.training.objective import as_batch

if TYPE_CHECKING:
    from fledge.training.objective import Objective
    from fledge.training.trainer import Trainer

PACE = 20
"""steps from which the time is predicted"""
WARM = 3  # steps in which things are compiled and memory is found
LAZY = 0.07e9
"""bytes of libraries that a process loads with its first step"""
AMPLE = 1.08
"""of what was predicted: how much may be held before free memory is given back, every `PACE` steps at the most"""


class Forecast:
    """Hears every step of a run."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.cuda = torch.device(trainer.device).type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.before = resident(self.cuda)
        self.plan: Plan | None = None
        self.shapes: set[tuple[int, ...]] = set()
        self.memory = self.peak = 0.0
        self.gave_back = 0
        self.ended: list[float] = []
        self.seconds = 0.0

    def step(self, done: int, batch: Mapping[str, Any]) -> None:
        """A step was made; `done` of them in all."""
        self.ended.append(time.monotonic())
        held = resident(self.cuda, peak=True)
        self.peak = max(self.peak, held)
        if len(self.ended) <= PACE:
            self._predict_memory(batch)
        elif not self.cuda and 0 < AMPLE * self.memory < held and len(self.ended) >= self.gave_back + PACE:
            # Freed pieces of many sizes fit seldom again, and the heap grows beyond what a step needs. Not after every
            # step: what goes back has to be asked for again.
            give_back()
            self.gave_back = len(self.ended)
        if len(self.ended) == PACE + 1 and done < self.trainer.steps:
            self._predict_time(done)

    def _predict_memory(self, batch: Mapping[str, Any]) -> None:
        shape = tuple(number for value in _ids(batch) for number in value.shape)
        if not shape or shape in self.shapes:
            return
        held = sum(p.numel() * p.element_size() for model in self.trainer.models.values() for p in model.parameters())
        if self.cuda:  # PyTorch counts its own tensors: no context, and no fragments
            around = replace(NOTHING, framework=max(0.0, self.before - held))
        else:
            around = replace(CPU, framework=max(0.0, self.before - held) + LAZY)
        some = [batch] if self.shapes else [batch, *self._largest()]
        self.shapes.add(shape)
        for plan in (plan_of(self.trainer, one) for one in some):
            if plan is not None and (needed := memory_of(plan, around).total) > self.memory:
                self.plan, self.memory = plan, needed
        if self.plan is not None and len(self.ended) == 1 and not self.cuda:
            self.trainer.events.metric("rate/train.framework", around.framework)

    def _largest(self) -> list[Mapping[str, Any]]:
        """The largest batch to come, if the source of the batches knows it."""
        source = self.trainer.source
        step_of = getattr(source, "largest", None)
        return [as_batch(source.batch(step_of(self.trainer.steps)))] if step_of else []

    def _predict_time(self, done: int) -> None:
        pace = (self.ended[-1] - self.ended[WARM]) / (len(self.ended) - 1 - WARM)
        left = pace * (self.trainer.steps - done)
        self.seconds = self.ended[-1] - self.ended[0] + left
        self.trainer.events.metric("predicted_seconds", self.seconds, done)
        if left > 120:
            self.trainer.events.message(
                t("by the pace of {count} steps: {time} left, {memory} of memory", count=PACE,
                  time=show_seconds(left), memory=show_bytes(max(self.memory, self.peak)))
            )  # fmt: skip

    def summary(self) -> dict[str, float]:
        """Predicted and measured, of this attempt, in bytes and seconds; what was not predicted is left out."""
        found: dict[str, float] = {}
        if self.memory:
            found |= {"predicted_memory": round(self.memory), "measured_memory": round(self.peak)}
        if self.seconds:
            measured = self.ended[-1] - self.ended[0]
            found |= {"predicted_seconds": round(self.seconds, 2), "measured_seconds": round(measured, 2)}
        return found


def plan_of(trainer: Trainer, batch: Mapping[str, Any]) -> Plan | None:
    """The run as the estimates see it, from its models and a batch; None where its shape is not known."""
    objective, settings = trainer.objective, trainer.settings
    model = trainer.models[objective.trainable[0]]
    ids = _ids(batch)
    if not hasattr(model, "config") or not ids or len(objective.trainable) > 1 or ids[0].ndim != 2:
        return None
    inner: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    base = sum(p.numel() for name, p in inner.named_parameters() if "lora_" not in name)
    network = Network.of_config(inner.config.to_dict(), base)
    if (small := getattr(inner, "generator", None)) is not None:  # ELECTRA's: as if its narrower layers stood on top
        share = small.config.hidden_size / network.hidden
        network = replace(network, layers=round(network.layers * (1 + share)))
    mine = -(-len(ids[0]) // trainer.ranks.copies)
    at_once = trainer.micro_batch if objective.rows_independent else getattr(objective, "rows_at_once", 0)
    rows = min(at_once or mine, mine)
    adapter = next(iter(model.peft_config.values())) if hasattr(model, "peft_config") else None
    places = batch.get("position_ids")
    packed = places is not None and "attention_mask" not in batch and int((places == 0).sum()) > len(places)
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in inner.modules())
    frozen = [p for name in objective.frozen for p in trainer.models[name].parameters()]
    width = next(inner.parameters()).element_size()
    return Plan(
        network, max(value.shape[-1] for value in ids), rows,
        "fp32" if settings.dtype == "float32" else "autocast", settings.optimizer, trainer.ranks.layout,
        accumulated=rows < mine, lora_rank=getattr(adapter, "r", 0), base_bytes=float(width) if adapter else 0.0,
        frozen_models=sum(p.numel() * p.element_size() for p in frozen) / 4, compiled=compiled, packed=packed,
        checkpointing=trainer.activation_checkpointing, objective=_objective(objective, inner, len(ids)),
        written=batch["labels"].shape[-1] if network.decoder_layers and "labels" in batch else 0,
        scores=0.0 if torch.device(trainer.device).type == "cuda" else network.exact_scores,
    )  # fmt: skip


def _ids(batch: Mapping[str, Any]) -> list[Any]:
    """The tokens of every text of a row; what a decoder beside an encoder writes is no text of its own."""
    return [value for name, value in batch.items() if name.rpartition(".")[2] == "input_ids"]


def _objective(objective: Objective, model: Any, sides: int) -> Any:
    """How many forward passes are kept, and whether there is an output layer over the vocabulary."""
    if hasattr(objective, "rows_at_once"):
        return "texts"
    whole = model.get_output_embeddings() is not None
    return ("pairs" if whole else "ranks") if sides > 1 else ("tokens" if whole else "labels")


def resident(cuda: bool = False, peak: bool = False) -> float:
    """Bytes that this process holds now (on a card: that its tensors held at the most since the run began).

    While a CPU trains, freed memory is kept (`training.kernels`), so that the size after a step is that step's peak.
    """
    if cuda:
        return float(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    statm = Path("/proc/self/statm")
    if statm.exists():
        return float(int(statm.read_text().split()[1]) * resource.getpagesize())
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
