"""Pipeline parallelism through torch.distributed.pipelining: the layers divided among processes.

A stage is the whole model with gaps: the layers of others pass on what they get, and in place of the embedding stands
what the stage before has sent. So the objective's own code runs on the last stage, and every parameter has the name
that it has in the whole model. Schedules: GPipe (Huang et al., 2019), 1F1B (Narayanan et al., 2019), interleaved 1F1B
(Narayanan et al., 2021), zero bubble (Qi et al., 2023); the last two give each process two stages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from fledge.training.layout.families import FAMILIES
from fledge.training.likelihood import decoder_of, hidden_states
from fledge.training.objective import Batch, Term, rows_of

SCHEDULES: Mapping[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
Loss = Callable[[Mapping[str, Any], Batch], tuple[Tensor | None, dict[str, Term]]]
"""(models, rows) → what to go down from, and the terms."""


def stages_each(schedule: str) -> int:
    """Stages that a process holds under a schedule."""
    return 2 if schedule in ("interleaved", "zero_bubble") else 1


def layers_of_stage(layers: int, stages: int, stage: int) -> range:
    """The layers of a stage: contiguous, as equal as can be."""
    return range(layers * stage // stages, layers * (stage + 1) // stages)


class Chunk(nn.Module):
    """One stage: a model with gaps, and the micro-batches of the step in hand."""

    def __init__(
        self, name: str, model: Any, stage: int, stages: int, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.stage, self.first, self.last = stage, stage == 0, stage == stages - 1
        self.name = name
        self.model = with_gaps(model, stage, stages)
        self.received = _received(self.model)
        self.others: Mapping[str, Any] = {}
        self.micros: Sequence[Batch] = ()
        self.loss: Loss | None = None
        self.terms: dict[int, dict[str, Term]] = {}

    def begin(self, micros: Sequence[Batch], loss: Loss, others: Mapping[str, Any]) -> None:
        """Take the rows of a step, what to make of the last hidden states, and the models that are only asked."""
        self.micros, self.loss, self.others, self.terms = micros, loss, others, {}

    def forward(self, sent: Tensor, index: Tensor) -> Tensor:
        """Hidden states (B, T, D) of a micro-batch; on the last stage its loss, a scalar."""
        number = int(index)
        micro = self.micros[number]
        if self.received is not None:
            self.received.sent = sent
        if not self.last:
            with self.autocast():
                hidden = hidden_states(self.model, micro)
            return hidden.to(self.model.dtype)
        assert self.loss is not None
        total, self.terms[number] = self.loss({**self.others, self.name: self.model}, micro)
        assert total is not None
        return total.float()


class Pipeline:
    """The stages of this process, and their schedule."""

    def __init__(self, chunks: Sequence[Chunk], runs: Sequence[nn.Module], schedule: str, group: Any, device: str):
        self.chunks, self.runs, self.schedule, self.group = chunks, runs, schedule, group
        self.device = torch.device(device)
        self._made: dict[tuple[int, ...], Any] = {}

    def backward(self, micros: Sequence[Batch], loss: Loss, others: Mapping[str, Any]) -> list[dict[str, Term]]:
        """Add the gradients of the micro-batches to those that are there; their terms, where the last stage is."""
        for chunk in self.chunks:
            chunk.begin(micros, loss, others)
        ids = [micro["input_ids"] for micro in micros]
        schedule = self._schedule(len(micros), *ids[0].shape)
        first = any(chunk.first for chunk in self.chunks)
        numbers = torch.arange(len(micros))
        schedule.step(*([torch.cat(ids)] if first else []), index=numbers, target=numbers, return_outputs=False)
        return [chunk.terms[index] for chunk in self.chunks if chunk.last for index in sorted(chunk.terms)]

    def _schedule(self, micros: int, rows: int, length: int) -> Any:
        """A schedule for micro-batches of one shape. It keeps buffers for what it receives: the last few are kept."""
        key = (micros, rows, length)
        if key not in self._made:
            if len(self._made) > 3:
                self._made.pop(next(iter(self._made)))
            stages = [self._stage(c, r, rows, length) for c, r in zip(self.chunks, self.runs, strict=True)]
            cls, given = SCHEDULES[self.schedule], stages if stages_each(self.schedule) > 1 else stages[0]
            self._made[key] = cls(
                given, n_microbatches=micros, loss_fn=lambda output, target: output, scale_grads=False
            )
        return self._made[key]

    def _stage(self, chunk: Chunk, run: nn.Module, rows: int, length: int) -> PipelineStage:
        width = chunk.model.config.get_text_config().hidden_size
        hidden = torch.empty(rows, length, width, dtype=chunk.model.dtype, device="meta")
        ids, loss = torch.empty(rows, length, dtype=torch.long, device="meta"), torch.empty((), device="meta")
        total = dist.get_world_size(self.group) * len(self.chunks)
        return PipelineStage(
            run, chunk.stage, total, self.device, ids if chunk.first else hidden.requires_grad_(),
            (loss if chunk.last else hidden).requires_grad_(), group=self.group,
        )  # fmt: skip


# --- models with gaps ------------------------------------------------------------------------------------------------


class _Pass(nn.Module):
    """Stands where another process has a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):  # read by the loop over the layers
            self.attention_type = layer.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


class _Received(nn.Module):
    """Stands where the first stage has the embedding. `weight` is there where the output layer is tied to it."""

    sent: Tensor

    def __init__(self, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.sent


class _NoPositions(nn.Module):
    """Stands where the first stage has learned positions."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros((), device=ids.device)


def with_gaps(model: Any, stage: int, stages: int) -> Any:
    """What a stage needs of `model`, with the same parameters (not copies of them) under the same names."""
    made = copied(model)
    inner = made.get_base_model() if hasattr(made, "peft_config") else made
    family, body = FAMILIES[made.config.model_type], decoder_of(made)
    layers = body.get_submodule(family.layers)
    mine = layers_of_stage(len(layers), stages, stage)
    for index, layer in enumerate(layers):
        if index not in mine:
            layers[index] = _Pass(layer)
    head, embedding = inner.get_output_embeddings(), body.get_submodule(family.embedding)
    last = stage == stages - 1
    if stage:
        tied = head is not None and head.weight is embedding.weight
        setattr(body, family.embedding, _Received(embedding.weight if last and tied else None))
        if family.positions:
            setattr(body, family.positions, _NoPositions())
            body.drop = nn.Identity()
    if not last:
        setattr(body, family.final_norm, nn.Identity())
        for name, child in list(inner.named_children()):
            if child is not body and any(True for _ in child.parameters()):
                setattr(inner, name, nn.Identity())
    return made


def copied(model: Any) -> Any:
    """The same modules once more, around the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _received(model: Any) -> _Received | None:
    return next((module for module in model.modules() if isinstance(module, _Received)), None)


def padded(batch: Batch, rows: int) -> dict[str, Tensor]:
    """The batch with rows that count for nothing behind, so that there are `rows`: no row of theirs has a label."""
    missing = rows - rows_of(batch)
    if missing <= 0:
        return dict(batch)
    found = {}
    for name, value in batch.items():
        more = value[-1:].repeat(missing, *[1] * (value.ndim - 1))
        if name == "labels":
            more = torch.full_like(more, -100)
        found[name] = torch.cat([value, more])
    return found
