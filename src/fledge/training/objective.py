"""The fourth noun. An objective says what a training run minimises; the Trainer does everything else.

    class CausalLM(Objective):
        def weights(self, batch): return {"loss": (batch["labels"] >= 0).sum()}
        def forward(self, models, batch): ...
        def loss(self, outputs, batch): return {"loss": Term(nll_sum, weight)}

A term is a *sum* and the weight it stands for. The Trainer divides every term by its weight over the whole batch, all
micro-batches and all ranks together; an average of averages would make the result depend on how rows are split
(with uneven masks, by more than half of the gradient).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

Batch: TypeAlias = Mapping[str, Tensor]
"""Tensors whose first axis is the rows of the batch."""


@dataclass(frozen=True)
class Term:
    """One part of a loss: minimise coefficient · Σ sum / Σ weight. With coefficient 0 it is only measured."""

    sum: Tensor
    weight: float | Tensor
    coefficient: float = 1.0


class BatchSource(Protocol):
    """Where batches come from: a pure function of the step, which is what makes a resumed run exact."""

    def batch(self, step: int) -> Any:
        """The batch of `step`, whatever was asked before."""
        ...


class Objective(ABC):
    """What is minimised. Stateless: the models are given to it."""

    trainable: ClassVar[tuple[str, ...]] = ("model",)
    """names of the models that are trained"""
    frozen: ClassVar[tuple[str, ...]] = ()
    """names of the models that are only asked: a reference, a teacher, a reward model"""
    rows_independent: ClassVar[bool] = True
    """whether a row's loss ignores the other rows (else the micro-batch is part of the result)"""
    pipelines: ClassVar[bool] = False
    """whether the last hidden state of one model for each of the batch's own tokens suffices (else neither a pipeline
    can carry it, nor can the tokens of a row be divided)"""
    dropout: ClassVar[bool] = True
    """whether the models that are trained drop out as they are configured to"""

    @abstractmethod
    def weights(self, batch: Batch) -> dict[str, float]:
        """The weight of every term that has a coefficient, for all rows of `batch`, known before the forward pass."""

    @abstractmethod
    def forward(self, models: Mapping[str, Any], batch: Batch) -> Any:
        """Ask the models; what comes out is what `loss` needs."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        """The terms for the rows of `batch`."""

    def tokens(self, batch: Batch) -> int:
        """Tokens that the models read for `batch`, for the rate."""
        return sum(value.numel() for name, value in batch.items() if name.endswith("input_ids"))


def as_batch(arrays: Any, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """A source's batch (a mapping or a dataclass of arrays) as tensors on `device`.

    What is None is left out; the arrays of a batch within a batch get dotted names, as in `chosen.input_ids`.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in (arrays if isinstance(arrays, Mapping) else vars(arrays)).items():
        if isinstance(value, Tensor | np.ndarray):
            tensors[name] = torch.as_tensor(value).to(device)
        elif value is not None:
            tensors |= {f"{name}.{key}": inner for key, inner in as_batch(value, device).items()}
    return tensors


def side(batch: Batch, name: str) -> dict[str, Tensor]:
    """The batch within a batch: the arrays whose names begin with `name` and a dot."""
    return {key.removeprefix(f"{name}."): value for key, value in batch.items() if key.startswith(f"{name}.")}


def rows_of(batch: Batch) -> int:
    """How many rows a batch has."""
    return next(iter(batch.values())).shape[0]


def take(batch: Batch, rows: slice) -> dict[str, Tensor]:
    """Some rows of a batch."""
    return {name: value[rows] for name, value in batch.items()}
