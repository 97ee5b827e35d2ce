"""Causal language modelling: every token from those before it, −Σ log p(xₜ | x₍<ₜ₎) (Bengio et al., 2003)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fledge.training.likelihood import IGNORED, head_of, hidden_states, shifted, weighted_nll
from fledge.training.objective import Batch, Objective, Term


class CausalLM(Objective):
    """The mean over all target tokens, in nats. Batches: `input_ids`, `labels`, and `position_ids` of packed rows.

    With `z_loss` the softmax's normaliser is held near 1 (see `likelihood.weighted_nll`).
    """

    def __init__(self, z_loss: float = 0.0) -> None:
        self.z_loss = z_loss

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"objective" if self.z_loss else "nll": self._targets(batch)}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """What is minimised and Σ −log p over the batch's targets, scalars; the logits are never whole in memory."""
        hidden = hidden_states(models["model"], batch)
        return weighted_nll(hidden, head_of(models["model"]), shifted(batch["labels"]), z_loss=self.z_loss)

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Term]:
        total, nll = outputs
        weight = self._targets(batch)
        if not self.z_loss:
            return {"nll": Term(total, weight)}
        return {"objective": Term(total, weight), "nll": Term(nll, weight, coefficient=0.0)}

    def _targets(self, batch: Batch) -> float:
        return float((shifted(batch["labels"]) != IGNORED).sum())
