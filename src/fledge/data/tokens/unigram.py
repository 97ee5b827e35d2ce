"""Training a Unigram vocabulary (Kudo, 2018) on counted words, so that it repeats bit for bit.

The trainer of the `tokenizers` library walks hash maps whose order differs from process to process, and sums its
expectations in that order: the same text gives other scores each time. Here words, pieces and lattices are sorted
arrays, and every sum has one order.

A word's probability is the sum over all ways to cut it into pieces. Expectation maximisation fits the pieces'
probabilities; of the pieces, the quarter whose loss would raise the likelihood of the text least is then given up;
and again, until the vocabulary has the size asked for. Single characters are never given up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints, Floats = NDArray[np.int64], NDArray[np.float64]
LONGEST_PIECE, LONGEST_WORD = 16, 48  # characters
_KEPT, _ROUNDS = 0.75, 2  # of the pieces after each pruning; iterations of EM between two
_SEEDS = 8  # pieces to begin with, for each that is wanted


@dataclass(frozen=True)
class Lattice:
    """All ways to cut some words into known pieces: edges from node to node, the nodes of a word one after another."""

    sources: Ints  # (E,) node an edge leaves
    targets: Ints  # (E,) node it enters
    pieces: Ints  # (E,)
    first: Ints  # (W,) first node of each word
    last: Ints  # (W,)
    place: Ints  # (N,) place of each node in its word

    def only(self, kept: NDArray[np.bool_], numbers: Ints) -> Lattice:
        """Without the edges of pieces that are not kept; the others get new numbers."""
        there = kept[self.pieces]
        pieces = numbers[self.pieces[there]]
        return Lattice(self.sources[there], self.targets[there], pieces, self.first, self.last, self.place)

    def levels(self, of: Ints) -> Iterator[Ints]:
        """The edges by the place of the node `of` them (their sources or targets) in its word, rising."""
        places = self.place[of].astype(np.int16)  # which numpy sorts by radix
        order = np.argsort(places, kind="stable")
        borders = np.searchsorted(places[order], np.arange(int(places.max(initial=0)) + 2))
        for low, high in pairwise(borders.tolist()):
            if high > low:
                yield order[low:high]


def train_unigram(words: Mapping[str, int], size: int, alphabet: Sequence[str]) -> list[tuple[str, float]]:
    """At most `size` pieces with their log-probabilities, likeliest first.

    `words` are counted stretches over which no piece reaches; what is not in `alphabet` separates them further.
    """
    counted = sorted(_parts(words, set(alphabet)).items())
    pieces = [*alphabet, *_seeds(counted, _SEEDS * size)]
    if not counted:
        return [(piece, 0.0) for piece in sorted(alphabet)[:size]]
    singles = len(alphabet)
    counts = np.array([count for _, count in counted], dtype=np.float64)
    text = lattice_of([word for word, _ in counted], pieces)
    own = lattice_of(pieces, pieces, whole=False)
    chances = np.ones(len(pieces)) / len(pieces)
    while True:
        for _ in range(_ROUNDS):
            expected = expectations(text, chances, counts)
            chances = np.maximum(expected, 1e-3) / np.maximum(expected, 1e-3).sum()
        target = max(size, singles, int(_KEPT * len(pieces)))
        if len(pieces) <= max(size, singles):
            break
        losses = expected * (np.log(chances) - best_log_chances(own, chances))
        losses[:singles] = np.inf
        kept = np.zeros(len(pieces), dtype=np.bool_)
        kept[np.argsort(-losses.round(6), kind="stable")[:target]] = True
        numbers = np.cumsum(kept) - 1
        pieces = [piece for piece, there in zip(pieces, kept, strict=True) if there]
        text, own = text.only(kept, numbers), own.only(kept, numbers)
        own = Lattice(own.sources, own.targets, own.pieces, own.first[kept], own.last[kept], own.place)
        chances = chances[kept] / chances[kept].sum()
    found = zip(pieces, (math.log(chance) for chance in chances.tolist()), strict=True)
    return sorted(found, key=lambda item: (-round(item[1], 9), item[0]))


def _parts(words: Mapping[str, int], known: set[str]) -> Counter[str]:
    """The words cut at characters that are not known, and where they are too long."""
    parts: Counter[str] = Counter()
    for word, count in words.items():
        text = word if known.issuperset(word) else "".join(c if c in known else "\0" for c in word)
        for part in text.split("\0"):
            for start in range(0, len(part), LONGEST_WORD):
                parts[part[start : start + LONGEST_WORD]] += count
    return parts


def _seeds(counted: Sequence[tuple[str, int]], most: int) -> list[str]:
    """Stretches of two characters and more that occur at least twice: those that cover most of the text, sorted.

    A stretch is counted only where both stretches that are one shorter were found often enough.
    """
    found: dict[str, int] = {}
    before: dict[str, int] | None = None
    for length in range(2, LONGEST_PIECE + 1):
        counts: Counter[str] = Counter()
        for word, count in counted:
            for start in range(len(word) - length + 1):
                piece = word[start : start + length]
                if before is None or (piece[:-1] in before and piece[1:] in before):
                    counts[piece] += count
        before = {piece: count for piece, count in counts.items() if count > 1}
        if not before:
            break
        found.update(before)
    covering = sorted(found, key=lambda piece: (-found[piece] * len(piece), piece))
    return sorted(covering[:most])


def lattice_of(words: Sequence[str], pieces: Sequence[str], whole: bool = True) -> Lattice:
    """The lattice of some words. Without `whole`, no piece may be a word by itself (but for single characters)."""
    number = {piece: index for index, piece in enumerate(pieces)}
    sources: list[int] = []
    targets: list[int] = []
    used: list[int] = []
    first, last, base = [], [], 0
    for word in words:
        size = len(word)
        for start in range(size):
            for end in range(start + 1, min(size, start + LONGEST_PIECE) + 1):
                if not whole and end - start == size and size > 1:
                    continue
                piece = number.get(word[start:end])
                if piece is not None:
                    sources.append(base + start)
                    targets.append(base + end)
                    used.append(piece)
        first.append(base)
        last.append(base + size)
        base += size + 1
    nodes = np.arange(base)
    starts = np.array(first, dtype=np.int64)
    place = nodes - starts[np.searchsorted(starts, nodes, side="right") - 1]
    arrays = (np.array(values, dtype=np.int64) for values in (sources, targets, used, first, last))
    return Lattice(*arrays, place)


def expectations(lattice: Lattice, chances: Floats, counts: Floats) -> Floats:
    """(P,) how often each piece is expected in the words, of which there are `counts` (the E-step; forward-backward).

    `np.add.at` adds one after another, in the order of the edges: the sums are the same wherever they are made.
    """
    nodes = len(lattice.place)
    forward, backward = np.zeros(nodes), np.zeros(nodes)
    forward[lattice.first], backward[lattice.last] = 1.0, 1.0
    weights = chances[lattice.pieces]
    for edges in lattice.levels(lattice.targets):
        np.add.at(forward, lattice.targets[edges], forward[lattice.sources[edges]] * weights[edges])
    for edges in reversed(list(lattice.levels(lattice.sources))):
        np.add.at(backward, lattice.sources[edges], backward[lattice.targets[edges]] * weights[edges])
    per_word = counts / np.maximum(forward[lattice.last], 1e-300)
    words = np.searchsorted(lattice.first, lattice.sources, side="right") - 1
    passed = forward[lattice.sources] * weights * backward[lattice.targets] * per_word[words]
    return np.bincount(lattice.pieces, passed, minlength=len(chances))


def best_log_chances(lattice: Lattice, chances: Floats) -> Floats:
    """(W,) the log-probability of the likeliest way to cut each word (Viterbi)."""
    best = np.full(len(lattice.place), -1e9)
    best[lattice.first] = 0.0
    weights = np.log(chances)[lattice.pieces]
    for edges in lattice.levels(lattice.targets):
        np.maximum.at(best, lattice.targets[edges], best[lattice.sources[edges]] + weights[edges])
    return best[lattice.last]
