"""BM25: how well a text answers the words of a query (Robertson and Walker, 1994; Robertson and Zaragoza, 2009).

    score(q, d) = Σ_{w in q} idf(w) · tf(w, d) · (k1 + 1) / (tf(w, d) + k1 · (1 − b + b · |d| / mean |d|))
    idf(w)      = ln(1 + (N − df(w) + ½) / (df(w) + ½))                    # Lucene's: never below zero

The inverted lists are three arrays (CSR by word), so a query costs one slice a word, whatever the number of texts.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fledge.inference.retrieval.ranking import top

ARRAYS = ("starts", "docs", "counts", "lengths")


@dataclass(frozen=True)
class Postings:
    """Which texts hold which word how often. Words are sorted, and the texts of a word; W words, N texts, P pairs."""

    terms: Sequence[str]
    starts: NDArray[np.int64]
    """(W + 1,) where the list of each word begins"""
    docs: NDArray[np.int32]
    """(P,) numbers of texts"""
    counts: NDArray[np.int32]
    """(P,) how often the word stands there"""
    lengths: NDArray[np.int32]
    """(N,) words of each text"""

    @classmethod
    def of(cls, texts: Iterable[Sequence[str]]) -> Postings:
        """The lists of texts that are given as their words."""
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        flat, lengths = array("q"), array("i")
        for words in texts:
            flat.extend(map(numbers.__getitem__, words))
            lengths.append(len(words))
        names = sorted(numbers)
        rank = np.zeros(len(names), np.int64)
        rank[[numbers[name] for name in names]] = np.arange(len(names))
        sizes, texts_in_all = np.array(lengths, np.int32), max(1, len(lengths))
        pairs = rank[np.array(flat, np.int64)] * texts_in_all + np.repeat(np.arange(len(sizes)), sizes)
        pairs, counts = np.unique(pairs, return_counts=True)  # sorted by word, then by text
        starts = np.searchsorted(pairs, np.arange(len(names) + 1) * texts_in_all)
        docs = (pairs % texts_in_all).astype(np.int32)
        return cls(names, starts.astype(np.int64), docs, counts.astype(np.int32), sizes)

    @classmethod
    def assembled(cls, parts: Sequence[tuple[Postings, NDArray[np.int64]]], total: int) -> Postings:
        """The lists of `total` texts put together from older ones: with each part, where its texts go (−1: nowhere).
        The same as if all had been counted anew."""
        names: dict[str, int] = {}
        lengths = np.zeros(total, np.int32)
        columns: list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]] = []
        for part, places in parts:
            numbers = np.array([names.setdefault(word, len(names)) for word in part.terms], np.int64)
            lengths[places[places >= 0]] = part.lengths[places >= 0]
            goes = places[part.docs]
            kept = goes >= 0
            of_pair = np.repeat(numbers, np.diff(part.starts))
            columns.append((of_pair[kept], goes[kept].astype(np.int32), np.asarray(part.counts)[kept]))
        terms, docs, counts = (np.concatenate(column) for column in zip(*columns, strict=True))
        return _sorted(list(names), terms, docs, counts, lengths)

    def save(self, folder: Path) -> None:
        """`terms.txt` and four `.npy` files."""
        (folder / "terms.txt").write_text("\n".join(self.terms), encoding="utf-8")
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Postings:
        """What `save` wrote; the arrays stay on disk until they are read."""
        text = (folder / "terms.txt").read_text(encoding="utf-8")
        mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
        arrays = {name: np.asarray(array) for name, array in mapped.items()}  # slices of a memmap are slow to make
        return cls(text.split("\n") if text else [], **arrays)


def _sorted(
    names: list[str],
    terms: NDArray[np.int64],
    docs: NDArray[np.int32],
    counts: NDArray[np.int32],
    lengths: NDArray[np.int32],
) -> Postings:
    """Lists from pairs in any order; words that no text holds go."""
    used = np.bincount(terms, minlength=len(names)) if len(names) else np.zeros(0, np.int64)
    kept = sorted(number for number in range(len(names)) if used[number])
    kept.sort(key=names.__getitem__)
    rank = np.zeros(len(names), np.int64)
    rank[kept] = np.arange(len(kept))
    order = np.lexsort((docs, rank[terms]))
    starts = np.concatenate([[0], np.cumsum(used[kept])]).astype(np.int64)
    return Postings([names[number] for number in kept], starts, docs[order], counts[order], lengths)


class BM25:
    """Scores over inverted lists. `k1` bends the gain of repetition, `b` says how far long texts are marked down."""

    def __init__(self, postings: Postings, k1: float = 1.2, b: float = 0.75) -> None:
        self.postings, self.k1, self.b = postings, k1, b
        self._numbers: Mapping[str, int] = {word: number for number, word in enumerate(postings.terms)}
        lengths = np.asarray(postings.lengths, np.float64)
        mean = lengths.mean() if len(lengths) and lengths.any() else 1.0
        self._norms = k1 * (1 - b + b * lengths / mean)  # (N,)

    def __len__(self) -> int:
        return len(self.postings.lengths)

    @cached_property
    def idf(self) -> NDArray[np.float64]:
        """(W,) the weight of each word."""
        df = np.diff(self.postings.starts).astype(np.float64)
        return np.asarray(np.log(1 + (len(self) - df + 0.5) / (df + 0.5)))

    def weight(self, word: str) -> float:
        """The idf of a word; that of one that stands in no text is the highest there is."""
        number = self._numbers.get(word)
        return float(np.log(1 + (len(self) + 0.5) / 0.5)) if number is None else float(self.idf[number])

    def scores(self, query: Sequence[str]) -> NDArray[np.float64]:
        """(N,) the score of every text; a word that the query repeats counts as often."""
        total = np.zeros(len(self))
        for word, times in Counter(query).items():
            if (number := self._numbers.get(word)) is None:
                continue
            some = slice(self.postings.starts[number], self.postings.starts[number + 1])
            weights = self._weights[some]
            # As += would (a text stands in a list once), in less than half the time.
            np.add.at(total, self.postings.docs[some], weights if times == 1 else times * weights)
        return total

    @cached_property
    def _weights(self) -> NDArray[np.float64]:
        """(P,) what each pair adds to its text's score: computed once, 8 bytes a pair."""
        tf = self.postings.counts.astype(np.float64)
        tf *= (self.k1 + 1) / (tf + self._norms[self.postings.docs])
        return np.asarray(tf * np.repeat(self.idf, np.diff(self.postings.starts)))

    def search(self, query: Sequence[str], k: int) -> list[tuple[int, float]]:
        """The k best texts that share a word with the query, best first; of equal ones the first."""
        scores = self.scores(query)
        best = top(scores, k)
        return [(doc, score) for doc, score in zip(best, scores[best].tolist(), strict=True) if score > 0]
