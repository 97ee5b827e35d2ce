"""Causal language modelling: every token from those before it, −Σ log p(xₜ | x₍<ₜ₎) (Bengio et al., 2003)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fledge.training.likelihood import IGNORED, head_of, hidden_states, targets_of, weighted_nll
from fledge.training.monitoring.sources import by_source
from fledge.training.objective import Batch, Objective, Term


class CausalLM(Objective):
    """The mean over all target tokens, in nats. Batches: `input_ids`, `labels`, and `position_ids` of packed rows.

    With `z_loss` the softmax's normaliser is held near 1 (see `likelihood.weighted_nll`).
    """

    pipelines = True

    def __init__(self, z_loss: float = 0.0) -> None:
        self.z_loss = z_loss

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"objective" if self.z_loss else "nll": self._targets(batch)}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> tuple[Any, ...]:
        """What is minimised and Σ −log p over the batch's targets, scalars; the logits are never whole in memory.

        Where the batch names its sources, a term for each of them, only measured, stands behind the two.
        """
        hidden, head = hidden_states(models["model"], batch), head_of(models["model"])

        def measure(targets: Tensor) -> tuple[Tensor, Tensor]:
            return weighted_nll(hidden, head, targets, z_loss=self.z_loss)

        sums, sources = by_source(batch, targets_of(batch), measure)
        return (*sums, sources) if sources else sums

    def loss(self, outputs: tuple[Any, ...], batch: Batch) -> dict[str, Term]:
        total, nll, *sources = outputs
        weight = self._targets(batch)
        measured = sources[0] if sources else {}
        if not self.z_loss:
            return {"nll": Term(total, weight), **measured}
        return {"objective": Term(total, weight), "nll": Term(nll, weight, coefficient=0.0), **measured}

    def _targets(self, batch: Batch) -> float:
        return float((targets_of(batch) != IGNORED).sum())
