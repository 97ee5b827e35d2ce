"""How right a reader is: classes with their F1, entities that must match exactly, and the nearest partner."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fledge.core.intervals import wilson


def class_scores(gold: Sequence[int], found: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Accuracy with Wilson's interval, the mean F1 over the classes that occur (macro-F1), and each class by itself.

    A gold class of −1 is none of `names`: it counts as wrong.
    """
    right = sum(a == b for a, b in zip(gold, found, strict=True))
    classes = {}
    for number, name in enumerate(names):
        both = sum(a == b == number for a, b in zip(gold, found, strict=True))
        classes[name] = {**f1(both, found.count(number), gold.count(number)), "rows": gold.count(number)}
    occurring = [scores["f1"] for name, scores in classes.items() if scores["rows"] or scores["predicted"]]
    interval = wilson(right, len(gold))
    return {
        "accuracy": right / len(gold), "accuracy_low": interval.low, "accuracy_high": interval.high,
        "macro_f1": sum(occurring) / max(1, len(occurring)),
        "majority_accuracy": max(map(gold.count, set(gold))) / len(gold), "classes": classes,
    }  # fmt: skip


def entity_scores(gold: Sequence[Collection[Any]], found: Sequence[Collection[Any]]) -> dict[str, Any]:
    """Precision, recall and F1 over entities whose beginning, end and type are all right (micro-averaged), and by type.

    One collection of entities, each with a `type`, a text.
    """

    def counted(kind: str | None) -> dict[str, float]:
        both = predicted = there = 0
        for a, b in zip(gold, found, strict=True):
            wanted = {e for e in a if kind in (None, e.type)}
            given = {e for e in b if kind in (None, e.type)}
            both, predicted, there = both + len(wanted & given), predicted + len(given), there + len(wanted)
        return {**f1(both, predicted, there), "entities": there}

    kinds = sorted({entity.type for entities in (*gold, *found) for entity in entities})
    whole = counted(None)
    return {
        "entity_f1": whole["f1"], "entity_precision": whole["precision"], "entity_recall": whole["recall"],
        "entities": whole["entities"], "types": {kind: counted(kind) for kind in kinds},
    }  # fmt: skip


def f1(both: int, predicted: int, there: int) -> dict[str, float]:
    """Precision, recall and their harmonic mean; 0 where nothing is right."""
    return {
        "precision": both / predicted if predicted else 0.0,
        "recall": both / there if there else 0.0,
        "f1": 2 * both / (predicted + there) if predicted + there else 0.0,
        "predicted": predicted,
    }


def retrieval_scores(anchors: Tensor, partners: Tensor) -> dict[str, float]:
    """Of unit vectors (N, D) row by row: how often the nearest of all partners is the own one, and how they lie.

    Alignment is the mean squared distance of a pair, uniformity log E exp(−2 d²) over all pairs of different anchors
    (Wang and Isola, 2020); lower is better in both.
    """
    similarity = anchors @ partners.T
    nearest = similarity.argmax(dim=1)
    count = len(anchors)
    right = (nearest == torch.arange(count, device=anchors.device)).sum().item()
    interval = wilson(right, count)
    apart = torch.pdist(anchors.double()).square()
    return {
        "recall_at_1": right / count, "recall_at_1_low": interval.low, "recall_at_1_high": interval.high,
        "alignment": float((anchors - partners).square().sum(dim=1).double().mean()),
        "uniformity": float(apart.mul(-2).exp().mean().log()) if count > 1 else 0.0,
    }  # fmt: skip
