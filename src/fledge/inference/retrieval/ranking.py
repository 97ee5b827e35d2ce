"""Rankings: the best of many, several rankings made one, the relevant ones that are not alike, and how good one is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray


def top(scores: NDArray[Any], k: int) -> list[int]:
    """The places of the k highest scores, highest first, of equal ones the first: the same on every machine."""
    k = min(k, len(scores))
    if k <= 0:
        return []
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
    order: list[int] = above[np.argsort(-scores[above], kind="stable")].tolist()
    order += equal[: k - len(order)].tolist()
    return order


def fuse(rankings: Sequence[Sequence[int]], constant: float = 60.0) -> list[tuple[int, float]]:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher, 2009): Σ 1 / (constant + rank), ranks from 1, best first.

    It asks only for the order, so that scores of different kinds need no common scale.
    """
    total: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            total[item] = total.get(item, 0.0) + 1 / (constant + rank)
    return sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))


def mmr(
    relevance: Sequence[float], similarity: Callable[[int, int], float], k: int, diversity: float = 0.3
) -> list[int]:
    """Maximal marginal relevance (Carbonell and Goldstein, 1998): k places, each time the one with the highest

        (1 − diversity) · relevance(i) − diversity · max over the chosen j of similarity(i, j)

    `relevance` and `similarity` on one scale (0 … 1). diversity 0 is the order of relevance.
    """
    nearest = [0.0] * len(relevance)  # to what is chosen already
    left = list(range(len(relevance)))
    chosen: list[int] = []
    while left and len(chosen) < k:
        best = max(left, key=lambda i: ((1 - diversity) * relevance[i] - diversity * nearest[i], -i))
        left.remove(best)
        chosen.append(best)
        for i in left:
            nearest[i] = max(nearest[i], similarity(i, best))
    return chosen


def recall_at(ranked: Sequence[Any], relevant: Set[Any], k: int) -> float:
    """The share of the relevant ones that stand among the first k. Raises ValueError where nothing is relevant."""
    if not relevant:
        raise ValueError("recall of nothing is not defined")
    return len(relevant & set(ranked[:k])) / len(relevant)


def reciprocal_rank(ranked: Sequence[Any], relevant: Set[Any]) -> float:
    """1 / rank of the first relevant one, 0 where there is none; its mean over queries is MRR (Voorhees, 1999)."""
    return next((1 / rank for rank, item in enumerate(ranked, 1) if item in relevant), 0.0)


def ndcg_at(ranked: Sequence[Any], gains: Mapping[Any, float], k: int) -> float:
    """Normalised discounted cumulative gain (Järvelin and Kekäläinen, 2002): Σ gain / log2(rank + 1) over the first k,
    divided by the best that an order could reach. An item that is ranked twice gains once."""
    found = list(dict.fromkeys(ranked))[:k]
    best = sorted(gains.values(), reverse=True)[:k]
    ideal = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(best, 1))
    if ideal <= 0:
        raise ValueError("nDCG needs a gain above 0")
    return sum(gains.get(item, 0.0) / math.log2(rank + 1) for rank, item in enumerate(found, 1)) / ideal
