"""Intervals against published values, symmetry, and the coverage that they promise."""

from __future__ import annotations

import math
import random

import pytest

from fledge.core.intervals import (
    mcnemar,
    mean_interval,
    paired_difference,
    paired_proportions,
    ratio_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(right: int, n: int, low: float, high: float) -> None:
    interval = wilson(right, n)
    assert interval.value == right / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_is_symmetric_and_stays_inside() -> None:
    for n in (1, 2, 7, 100):
        for right in range(n + 1):
            a, b = wilson(right, n), wilson(n - right, n)
            assert a.low == pytest.approx(1 - b.high, abs=1e-12)
            assert 0 <= a.low <= a.value <= a.high <= 1
    assert wilson(0, 0).low == 0 and wilson(0, 0).high == 1
    with pytest.raises(ValueError, match="5 right of 4"):
        wilson(5, 4)


def test_an_interval_that_holds_the_baseline_decides_nothing() -> None:
    assert wilson(70, 100).above(0.5) and not wilson(70, 100).below(0.5)
    assert not wilson(55, 100).above(0.5) and not wilson(55, 100).below(0.5)
    assert wilson(30, 100).below(0.5)


def test_bootstrap_of_a_mean_is_the_normal_interval_on_many_items() -> None:
    values = [random.Random(1).gauss(3, 2) for _ in range(1)] + [random.Random(i).gauss(3, 2) for i in range(800)]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    interval = mean_interval(values, seed=3)
    assert interval.value == pytest.approx(mean)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * deviation / math.sqrt(len(values)), rel=0.08)
    assert interval == mean_interval(values, seed=3)
    assert interval != mean_interval(values, seed=4)


def test_a_ratio_weighs_tokens_not_conversations() -> None:
    interval = ratio_interval([10.0, 300.0], [10, 100], seed=0)
    assert interval.value == pytest.approx(310 / 110)
    assert interval.low == pytest.approx(1.0) and interval.high == pytest.approx(3.0)
    assert ratio_interval([4.0], [2.0], seed=0).to_json() == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 1}
    with pytest.raises(ValueError, match="some weight"):
        ratio_interval([1.0], [0.0], seed=0)


def test_paired_difference_cancels_what_both_share() -> None:
    rng = random.Random(5)
    hardness = [rng.gauss(0, 10) for _ in range(300)]
    a = [h + 0.5 + rng.gauss(0, 0.1) for h in hardness]
    interval = paired_difference(a, hardness, seed=1)
    assert 0.45 < interval.low < interval.value < interval.high < 0.55
    with pytest.raises(ValueError, match="same items"):
        paired_difference([1.0], [], seed=0)


def test_mcnemar_gives_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)


def test_paired_proportions_by_hand_and_by_coverage() -> None:
    interval = paired_proportions(9, 1, 20)
    p, q = 10 / 22, 2 / 22
    half = 1.959963984540054 * math.sqrt((p + q - (p - q) ** 2) / 22)
    assert interval.value == pytest.approx(0.4)
    assert (interval.low, interval.high) == (pytest.approx(p - q - half), pytest.approx(p - q + half))
    mirrored = paired_proportions(1, 9, 20)
    assert (mirrored.low, mirrored.high) == (pytest.approx(-interval.high), pytest.approx(-interval.low))

    rng, inside, trials = random.Random(0), 0, 2000
    for _ in range(trials):  # true difference 0.25 − 0.10 on 40 items
        draws = rng.choices(("a", "b", "same"), (0.25, 0.10, 0.65), k=40)
        found = paired_proportions(draws.count("a"), draws.count("b"), 40)
        inside += found.low <= 0.15 <= found.high
    assert inside / trials > 0.94
