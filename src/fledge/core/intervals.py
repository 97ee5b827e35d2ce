"""How sure a number is. Every score that the project shows stands in an interval of 95 %.

Proportions take Wilson's score interval; means and ratios a seeded bootstrap over the items; two models that
answered the same items are compared item by item: McNemar's exact test and the interval of Bonett and Price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Z95 = 1.959963984540054
"""The two-sided 95 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Interval:
    """A value between `low` and `high`, measured on `n` independent items."""

    value: float
    low: float
    high: float
    n: int

    def above(self, baseline: float) -> bool:
        """Whether the whole interval lies above `baseline`; an interval that holds it decides nothing."""
        return self.low > baseline

    def below(self, baseline: float) -> bool:
        """Whether the whole interval lies below `baseline`."""
        return self.high < baseline

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def wilson(right: float, n: int, z: float = Z95) -> Interval:
    """Wilson's score interval (1927) for `right` of `n`; a tie counts one half. Of n = 0 nothing is known: [0, 1]."""
    if n <= 0:
        return Interval(0.5, 0.0, 1.0, 0)
    if not 0 <= right <= n:
        raise ValueError(f"{right} right of {n}")
    p, shrink = right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if right == 0 else max(0.0, centre - half)
    high = 1.0 if right == n else min(1.0, centre + half)
    return Interval(p, low, high, n)


def ratio_interval(sums: Sequence[float], weights: Sequence[float], seed: int, draws: int = 2000) -> Interval:
    """Σ sums / Σ weights, as a loss per token over whole conversations, with a percentile bootstrap over the items.

    Raises ValueError when the weights add up to nothing.
    """
    import numpy as np

    s, w = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
    if s.shape != w.shape or not w.sum() > 0:
        raise ValueError("a ratio needs one weight for each sum, and some weight")
    value = float(s.sum() / w.sum())
    if len(s) == 1:
        return Interval(value, value, value, 1)
    random = np.random.default_rng(seed)
    counts = random.multinomial(len(s), np.full(len(s), 1 / len(s)), size=draws)  # (draws, items)
    totals = counts @ w
    ratios = (counts @ s)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(value, float(low), float(high), len(s))


def mean_interval(values: Sequence[float], seed: int, draws: int = 2000) -> Interval:
    """The mean of `values` with a percentile bootstrap."""
    return ratio_interval(values, [1.0] * len(values), seed, draws)


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int, draws: int = 2000) -> Interval:
    """The mean of a − b over the same items, with a percentile bootstrap over the items."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} items against {len(b)}: a paired comparison needs the same items")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], seed, draws)


def paired_proportions(only_a: float, only_b: float, n: int, z: float = Z95) -> Interval:
    """How much oftener a is right than b on the same `n` items, of which `only_a` and `only_b` are right in one alone.

    The adjusted Wald interval of Bonett and Price (2012, "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data"), which keeps its coverage on few items.
    """
    if n <= 0:
        return Interval(0.0, -1.0, 1.0, 0)
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Interval((only_a - only_b) / n, max(-1.0, p - q - half), min(1.0, p - q + half), n)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test: are the items on which two models differ a fair coin's?"""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, float(2 * tail))
