"""Causal language modelling: every token from those before it, −Σ log p(xₜ | x₍<ₜ₎) (Bengio et al., 2003)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fledge.training.likelihood import IGNORED, hidden_states, output_weight, shifted, weighted_nll
from fledge.training.objective import Batch, Objective, Term


class CausalLM(Objective):
    """The mean over all target tokens, in nats. Batches: `input_ids`, `labels`, and `position_ids` of packed rows."""

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"nll": float((shifted(batch["labels"]) != IGNORED).sum())}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> Tensor:
        """Σ −log p over the batch's targets, a scalar; the logits are never whole in memory."""
        hidden = hidden_states(models["model"], batch)
        return weighted_nll(hidden, output_weight(models["model"]), shifted(batch["labels"]))

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Term]:
        return {"nll": Term(outputs, self.weights(batch)["nll"])}
