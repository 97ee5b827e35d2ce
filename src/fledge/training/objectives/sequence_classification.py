"""Sequence classification: one class for a whole text, −E[log p(y | x)] (Devlin et al., 2019, section 4.1).

The head is the family's own in transformers: encoders read their first token, decoders the last one that is not
padding. With class weights w the mean is Σ w[y] · loss ÷ Σ w[y]; with label smoothing ε (Szegedy et al., 2016,
section 7) the target is (1 − ε) · one-hot + ε / K. Both are those of torch's `CrossEntropyLoss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.training.objective import Batch, Objective, Term


class SequenceClassification(Objective):
    """Batches: `input_ids`, `attention_mask` (B, T) and `labels` (B,). The model: sequence classification."""

    def __init__(self, class_weights: Sequence[float] = (), label_smoothing: float = 0.0) -> None:
        self.class_weights, self.label_smoothing = tuple(class_weights), label_smoothing

    def weights(self, batch: Batch) -> dict[str, float]:
        labels = batch["labels"]
        weights = self._class_weights(labels.device)
        return {"cross_entropy": float(len(labels) if weights is None else weights[labels].sum())}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> Tensor:
        """Logits in fp32: (B, K)."""
        return head_logits(models["model"], batch)

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Term]:
        labels = batch["labels"]
        total = F.cross_entropy(
            outputs,
            labels,
            self._class_weights(outputs.device, outputs.dtype),
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        right = (outputs.argmax(dim=-1) == labels).sum()
        return {
            "cross_entropy": Term(total, self.weights(batch)["cross_entropy"]),
            "accuracy": Term(right, len(labels), coefficient=0.0),
        }

    def _class_weights(self, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor | None:
        return torch.tensor(self.class_weights, dtype=dtype, device=device) if self.class_weights else None


def head_logits(model: Any, batch: Batch) -> Tensor:
    """What the model's own head says of right-padded rows, in fp32: (B, K), or (B, T, K) of a tagger."""
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **no_cache(model)
    ).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def no_cache(model: Any) -> dict[str, bool]:
    """The argument that keeps a decoder from building a cache that nobody reads."""
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
