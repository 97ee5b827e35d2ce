"""Masked language modelling: −Σ log p(xₜ | x̃) over the selected tokens t of the corrupted row x̃ (Devlin et al., 2019).

The condition is the corrupted input: the tenth of the selected tokens that stayed and the tenth that became another
token are predicted like the masked ones. What is predicted, and from what, `data.tokens.corruption.masking` decides.
Logits are only made where something is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fledge.training.likelihood import IGNORED, weighted_nll
from fledge.training.objective import Batch, Objective, Term
from fledge.training.objectives.bidirectional import encoder_states, head_over_vocabulary, likeliest


class MaskedLM(Objective):
    """The mean over the selected tokens, in nats. Batches: corrupted `input_ids`, `labels` (−100 elsewhere),
    `position_ids`, and `attention_mask` of padded rows. Where no gradients are made, also the share guessed right."""

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"nll": float((batch["labels"] != IGNORED).sum())}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Σ −log p over the selected tokens, and how many of them the model would guess; scalars."""
        transform, head = head_over_vocabulary(models["model"])
        at = batch["labels"] != IGNORED
        targets = batch["labels"][at]
        states = transform(encoder_states(models["model"], batch)[at])  # (n, D) of the selected alone
        right = None if torch.is_grad_enabled() else (likeliest(states, head) == targets).sum()
        return weighted_nll(states, head, targets)[0], right

    def loss(self, outputs: tuple[Tensor, Tensor | None], batch: Batch) -> dict[str, Term]:
        nll, right = outputs
        count = self.weights(batch)["nll"]
        terms = {"nll": Term(nll, count)}
        return terms if right is None else {**terms, "accuracy": Term(right, count, coefficient=0.0)}
