"""Token classification: a class for every word, −E[log p(yₜ | x)] over the tokens that stand for one.

Named entities as BIO tags (Ramshaw and Marcus, 1995; Tjong Kim Sang and De Meulder, 2003): one token of each word
carries its tag, all others the label −100, which counts nothing. Every labelled token weighs the same, however long
its sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fledge.training.likelihood import IGNORED
from fledge.training.objective import Batch, Objective, Term
from fledge.training.objectives.sequence_classification import head_logits


class TokenClassification(Objective):
    """Batches: `input_ids`, `attention_mask` and `labels`, all (B, T). The model: token classification."""

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"cross_entropy": float((batch["labels"] != IGNORED).sum())}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> Tensor:
        """Logits in fp32: (B, T, K)."""
        return head_logits(models["model"], batch)

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Term]:
        kept = batch["labels"] != IGNORED
        logits, labels = outputs[kept], batch["labels"][kept]  # (n, K), (n,)
        weight = float(len(labels))
        return {
            "cross_entropy": Term(F.cross_entropy(logits, labels, reduction="sum"), weight),
            "tag_accuracy": Term((logits.argmax(dim=-1) == labels).sum(), weight, coefficient=0.0),
        }
