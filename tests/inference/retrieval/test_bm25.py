"""BM25 against a computation in plain Python from the formula, in both languages, and put together from parts."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from fledge.inference.retrieval.bm25 import ARRAYS, BM25, Postings
from fledge.inference.retrieval.words import words

TEXTS = [
    "The cat sat on the mat. The cat slept.", "A dog and a cat are animals", "", "图书馆每天开放",
    "图书馆的图书很多，图书可以借", "mixed 图书 and cats", "nothing alike here whatsoever " * 5,
]  # fmt: skip


def by_hand(texts: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    """Straight from Robertson and Zaragoza (2009, eq. 3.15) with Lucene's idf, one text after another."""
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        total = 0.0
        for word in query:
            df = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            tf = text.count(word)
            if tf:  # else 0, or 0 / 0 where k1 is 0
                total += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(text) / mean))
        scores.append(total)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.4), (2.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("query", ["cat", "the cat and the cat", "图书馆的图书", "unknown", "cats 图书 开放"])
def test_scores_are_those_of_the_formula(query: str, k1: float, b: float) -> None:
    texts = [words(text) for text in TEXTS]
    scores = BM25(Postings.of(texts), k1, b).scores(words(query))
    expected = by_hand(texts, words(query), k1, b)
    assert np.abs(scores - expected).max() < 1e-6
    assert (scores >= 0).all()


def test_scores_of_a_made_up_corpus_agree_too_and_the_best_come_first() -> None:
    draw = random.Random(3)
    texts = [[f"w{int(draw.paretovariate(0.7)) % 300}" for _ in range(draw.randrange(0, 60))] for _ in range(200)]
    searcher = BM25(Postings.of(texts))
    for _ in range(20):
        query = [f"w{draw.randrange(300)}" for _ in range(4)]
        expected = by_hand(texts, query, 1.2, 0.75)
        found = searcher.search(query, 7)
        order = sorted((i for i in range(200) if expected[i] > 0), key=lambda i: (-expected[i], i))[:7]
        assert [doc for doc, _ in found] == order
        assert all(score == pytest.approx(expected[doc], abs=1e-6) for doc, score in found)


def test_equal_scores_keep_the_order_of_the_texts_and_nothing_is_found_for_nothing() -> None:
    searcher = BM25(Postings.of([["a"], ["b"], ["a"], ["a"]]))
    assert [doc for doc, _ in searcher.search(["a"], 2)] == [0, 2]
    assert searcher.search(["z"], 5) == [] == searcher.search([], 5) == searcher.search(["a"], 0)
    assert BM25(Postings.of([])).search(["a"], 3) == []
    assert BM25(Postings.of([[], []])).search(["a"], 3) == []


def test_lists_put_together_are_those_counted_anew() -> None:
    texts = [words(text) for text in TEXTS]
    old = Postings.of(texts)
    new = [["fresh", "cat"], ["鲜"]]
    # texts 0, 3, 4 stay in another order, two new ones come between, 1, 2, 5 and 6 go
    places = np.array([4, -1, -1, 0, 2, -1, -1])
    made = Postings.assembled([(old, places), (Postings.of(new), np.array([1, 3]))], 5)
    anew = Postings.of([texts[3], new[0], texts[4], new[1], texts[0]])
    assert list(made.terms) == list(anew.terms) == sorted(anew.terms)
    assert all(np.array_equal(getattr(made, name), getattr(anew, name)) for name in ARRAYS)


def test_what_is_saved_is_loaded_byte_for_byte(tmp_path: Path) -> None:
    made = Postings.of([words(text) for text in TEXTS])
    made.save(tmp_path)
    again = Postings.load(tmp_path)
    assert list(again.terms) == list(made.terms)
    assert all(np.array_equal(getattr(again, name), getattr(made, name)) for name in ARRAYS)
    assert BM25(again).search(words("图书"), 2) == BM25(made).search(words("图书"), 2)
    (tmp_path / "empty").mkdir()
    Postings.of([]).save(tmp_path / "empty")
    assert len(BM25(Postings.load(tmp_path / "empty"))) == 0
