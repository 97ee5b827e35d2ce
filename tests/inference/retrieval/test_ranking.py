"""Fusion, diversity, exact neighbours and the measures of a ranking, each against its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fledge.core.errors import FledgeError
from fledge.inference.retrieval import vectors
from fledge.inference.retrieval.ranking import fuse, mmr, ndcg_at, recall_at, reciprocal_rank, top


def test_top_is_a_stable_sort() -> None:
    draw = np.random.default_rng(0)
    for k in (0, 1, 5, 40, 60):
        scores = draw.integers(0, 6, 50).astype(np.float64)
        assert top(scores, k) == sorted(range(50), key=lambda i: (-scores[i], i))[:k]


def test_reciprocal_rank_fusion_by_hand() -> None:
    fused = fuse([[7, 3, 9], [3, 8]], constant=60)
    assert [item for item, _ in fused] == [3, 7, 8, 9]
    assert dict(fused)[3] == pytest.approx(1 / 62 + 1 / 61)
    assert dict(fused)[9] == pytest.approx(1 / 63)


def test_mmr_takes_the_relevant_first_and_then_what_is_not_alike() -> None:
    relevance = [1.0, 0.98, 0.5, 0.1]
    alike = np.eye(4)
    alike[0, 1] = alike[1, 0] = 0.99  # the second best says what the best says
    assert mmr(relevance, lambda i, j: float(alike[i, j]), 3, diversity=0.0) == [0, 1, 2]
    assert mmr(relevance, lambda i, j: float(alike[i, j]), 3, diversity=0.5) == [0, 2, 3]
    assert mmr(relevance, lambda i, j: float(alike[i, j]), 9, diversity=0.5) == [0, 2, 3, 1]
    assert mmr([], lambda i, j: 0.0, 3) == []


def test_mmr_is_greedy_as_the_paper_defines_it() -> None:
    draw = np.random.default_rng(1)
    for _ in range(20):
        relevance, alike = draw.random(8), draw.random((8, 8))
        alike = (alike + alike.T) / 2
        chosen = mmr(relevance.tolist(), lambda i, j, a=alike: float(a[i, j]), 5, 0.4)
        for step, item in enumerate(chosen):
            before = chosen[:step]
            value = {
                i: 0.6 * relevance[i] - 0.4 * max((alike[i, j] for j in before), default=0.0)
                for i in range(8) if i not in before
            }  # fmt: skip
            assert value[item] == pytest.approx(max(value.values()))


def test_recall_and_reciprocal_rank() -> None:
    assert recall_at(["a", "b", "c", "d"], {"b", "d", "x"}, 3) == pytest.approx(1 / 3)
    assert recall_at(["a", "b", "c", "d"], {"b", "d"}, 4) == 1.0
    assert reciprocal_rank(["a", "b", "c"], {"c", "b"}) == 0.5
    assert reciprocal_rank(["a"], {"z"}) == 0.0
    with pytest.raises(ValueError, match="recall of nothing"):
        recall_at(["a"], set(), 1)


def test_ndcg_is_one_for_the_best_order_and_divides_by_it() -> None:
    gains = {"a": 3.0, "b": 2.0, "c": 1.0}
    best = max(ndcg_at(order, gains, 3) for order in itertools.permutations("abcx", 3))
    assert best == ndcg_at("abc", gains, 3) == 1.0
    dcg = 1 / math.log2(2) + 3 / math.log2(4)  # c at 1, nothing at 2, a at 3
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert ndcg_at(["c", "x", "a", "b"], gains, 3) == pytest.approx(dcg / ideal)
    assert ndcg_at(["a", "a", "a"], gains, 3) < 1  # found three times is found once
    with pytest.raises(ValueError, match="gain"):
        ndcg_at(["a"], {}, 3)


def test_the_nearest_are_exact_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(2)
    rows, query = vectors.unit(draw.normal(size=(300, 24)).astype(np.float32)), draw.normal(size=24).astype(np.float32)
    expected = np.argsort(-(rows.astype(np.float64) @ query), kind="stable")[:10].tolist()
    for size in (7, 64, 1000):
        monkeypatch.setattr(vectors, "_ROWS", size)
        found = vectors.nearest(rows, query, 10)
        assert [row for row, _ in found] == expected
        assert [score for _, score in found] == pytest.approx((rows @ query)[expected].tolist(), rel=1e-5)
    assert vectors.nearest(np.zeros((0, 24), np.float32), query, 3) == []


def test_a_vector_without_numbers_is_refused() -> None:
    with pytest.raises(FledgeError, match="NaN"):
        vectors.unit(np.array([[1.0, np.nan]], np.float32))
