"""Reward modelling: the preferred answer should score higher (Ouyang et al., 2022, eq. 1).

    loss(θ) = −1 / C(K, 2) · E [ log σ(r(x, y_chosen) − r(x, y_rejected)) ]

The mean over the C(K, 2) pairs of one prompt, then over prompts: a pair comes with the weight 1 / C(K, 2). The score
is the head's value at the last *attended* token, never at padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.training.likelihood import hidden_states
from fledge.training.objective import Batch, Objective, Term, side


class Reward(Objective):
    """Pairs of `chosen` and `rejected`, and `weights`. The model: sequence classification with one label."""

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"ranking": float(batch["weights"].sum())}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> Tensor:
        """Scores of the chosen and of the rejected answers: (2, B)."""
        return torch.stack([scores(models["model"], side(batch, name)) for name in ("chosen", "rejected")])

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Term]:
        margin, weights = outputs[0] - outputs[1], batch["weights"]
        return {
            "ranking": Term(-(weights * F.logsigmoid(margin)).sum(), float(weights.sum())),
            "accuracy": Term((weights * (margin > 0)).sum(), float(weights.sum()), coefficient=0.0),
            "margin": Term((weights * margin).sum(), float(weights.sum()), coefficient=0.0),
        }


def scores(model: Any, batch: Batch) -> Tensor:
    """The reward of every row, in fp32: (B,)."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    hidden = hidden_states(model, batch)  # (B, T, D)
    last = batch["attention_mask"].sum(dim=-1) - 1  # (B,) rows are padded on the right
    found: Tensor = inner.score(hidden[torch.arange(len(last), device=last.device), last]).squeeze(-1).float()
    return found
