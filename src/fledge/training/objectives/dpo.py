"""Direct preference optimisation (Rafailov et al., 2023, eq. 7).

    loss = −E [ log σ( β · (log π(y_c|x) / π_ref(y_c|x) − log π(y_r|x) / π_ref(y_r|x)) ) ]

with *summed* log-probabilities of the answers' tokens. β is the strength of the KL constraint to the reference, which
is the policy as it was before the first step: the first loss is ln 2 exactly. The reference's log-probabilities do
not change, so they are computed once (`reference.py`) and come with the batch. Dropout is off: it would make policy and
reference differ for no reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.training.likelihood import head_of, hidden_states, shifted, token_logprobs
from fledge.training.objective import Batch, Objective, Term, side


class DPO(Objective):
    """Pairs of `chosen` and `rejected` with `weights`, and `reference` (B, 2): both answers' log-probabilities."""

    dropout = False

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"dpo": float(batch["weights"].sum())}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> Tensor:
        return pair_logprobs(models["model"], batch)

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Term]:
        rewards = self.beta * (outputs - batch["reference"].to(outputs.dtype))  # (B, 2), implicit
        margin, weights = rewards[:, 0] - rewards[:, 1], batch["weights"].to(outputs.dtype)
        total = float(weights.sum())
        return {
            "dpo": Term(-(weights * F.logsigmoid(margin)).sum(), total),
            "accuracy": Term((weights * (margin > 0)).sum(), total, coefficient=0.0),
            "chosen_reward": Term((weights * rewards[:, 0]).sum(), total, coefficient=0.0),
            "rejected_reward": Term((weights * rewards[:, 1]).sum(), total, coefficient=0.0),
        }


def pair_logprobs(model: Any, batch: Batch) -> Tensor:
    """Summed log-probabilities of the chosen and the rejected answers under `model`, in fp32: (B, 2)."""
    return torch.stack([answer_logprobs(model, side(batch, name)) for name in ("chosen", "rejected")], dim=-1)


def answer_logprobs(model: Any, batch: Batch) -> Tensor:
    """Σ log p over the labelled tokens of every row: (B,)."""
    hidden = hidden_states(model, batch)
    return token_logprobs(hidden, head_of(model), shifted(batch["labels"])).sum(dim=-1)
