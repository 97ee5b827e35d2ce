"""Sequence to sequence: −Σ log p(yₜ | y₍<ₜ₎, x̃), a target read off a corrupted input by an encoder-decoder.

With spans as the targets it is span corruption (Raffel et al., 2020); `denoising` asks for the whole text instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fledge.training.likelihood import IGNORED, weighted_nll
from fledge.training.objective import Batch, Objective, Term
from fledge.training.objectives.bidirectional import head_over_vocabulary, likeliest, seq2seq_states


class SpanCorruption(Objective):
    """The mean over the target's tokens, in nats. Batches: `input_ids` (B, S), `decoder_input_ids` and `labels`
    (B, T), `documents` and `decoder_documents`. Where no gradients are made, also the share guessed right."""

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"nll": float((batch["labels"] != IGNORED).sum())}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Σ −log p over the target's tokens, and how many of them the model would guess; scalars."""
        transform, head = head_over_vocabulary(models["model"])
        at = batch["labels"] != IGNORED
        targets = batch["labels"][at]
        states = transform(seq2seq_states(models["model"], batch)[at])
        right = None if torch.is_grad_enabled() else (likeliest(states, head) == targets).sum()
        return weighted_nll(states, head, targets)[0], right

    def loss(self, outputs: tuple[Tensor, Tensor | None], batch: Batch) -> dict[str, Term]:
        nll, right = outputs
        count = self.weights(batch)["nll"]
        terms = {"nll": Term(nll, count)}
        return terms if right is None else {**terms, "accuracy": Term(right, count, coefficient=0.0)}

    def tokens(self, batch: Batch) -> int:
        return int(batch["input_ids"].numel())
