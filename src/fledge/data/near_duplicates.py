"""MinHash with locality-sensitive hashing: which texts are nearly the same.

Broder (1997); the setting is FineWeb's (Penedo et al., 2024): 5-grams, 14 bands of 8 rows, so that two texts of
Jaccard similarity s meet in some band with probability 1 - (1 - s⁸)¹⁴: 0.92 at s = 0.8, 0.05 at s = 0.5. Unlike
there, texts that meet are joined only if their whole signatures agree in at least `threshold` of the 112 places.

Hash functions are multiply-shift over 64-bit words with 32-bit results (Dietzfelbinger, 1996):
x ↦ (a·x + b) mod 2⁶⁴ >> 32 with a odd: exact integer arithmetic, two operations for each shingle. Units are words,
or characters where words are not spaced (see `texts.units`).

The representative of a cluster is chosen by rule (the longest, then the smallest id), and joining is decided between a
band's members and the best of them, so that the result does not depend on the order in which texts arrive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fledge.data.ngrams import Words64, mix, shingles, unit_hashes
from fledge.data.texts import units

Signature = NDArray[np.uint32]
_BLOCK = 2_048  # shingles at once: the block of all hashes stays in the cache


class MinHash:
    """Signatures of `bands * rows` hash functions drawn from `seed`."""

    def __init__(self, ngram: int = 5, bands: int = 14, rows: int = 8, seed: int = 1) -> None:
        self.ngram, self.bands, self.rows = ngram, bands, rows
        draws = mix(
            np.arange(1, 2 * bands * rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        )
        self._a = (draws[: bands * rows] | np.uint64(1))[:, None]  # (K, 1), odd
        self._b = draws[bands * rows :][:, None]  # (K, 1)

    def signature(self, text: str) -> Signature | None:
        """(K,) minima over the text's shingles; None for a text without a word."""
        return self.of(shingles(unit_hashes(units(text)), self.ngram))

    def of(self, grams: Words64) -> Signature | None:
        """The signature of a set of shingles."""
        if not len(grams):
            return None
        least = np.full(len(self._a), np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(grams), _BLOCK):
            values = self._a * grams[None, start : start + _BLOCK] + self._b  # (K, block), wraps
            np.minimum(least, values.min(axis=1), out=least)
        return (least >> np.uint64(32)).astype(np.uint32)  # the shift is monotone, so the minimum may come first

    def bands_of(self, signatures: Signature) -> Words64:
        """(n, bands) one 64-bit key for each band of each signature (n, K)."""
        rows = signatures.reshape(len(signatures), self.bands, self.rows).astype(np.uint64)
        keys = np.zeros(rows.shape[:2], dtype=np.uint64)
        for i in range(self.rows):
            keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + rows[:, :, i])
        return keys


def clusters(minhash: MinHash, signatures: Signature, ranks: NDArray[np.int64], threshold: float) -> NDArray[np.int64]:
    """(n,) for each text the index of its cluster's representative (its own where it stands alone).

    `signatures` (n, K); `ranks` (n,) a different number for each text, smaller is better: it depends on the texts
    alone, not on their order. Two texts that share a band are joined when their signatures agree in `threshold`
    of their places; a band's members are compared with the best ranked among them.
    """
    parent = np.arange(len(signatures))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    keys = minhash.bands_of(signatures)
    for band in range(minhash.bands):
        order = np.lexsort((ranks, keys[:, band]))  # equal keys together, the best first
        first = np.flatnonzero(np.r_[True, keys[order, band][1:] != keys[order, band][:-1]])
        leaders = order[np.repeat(first, np.diff(np.r_[first, len(order)]))]
        others = np.flatnonzero(leaders != order)
        agreement = (signatures[order[others]] == signatures[leaders[others]]).mean(axis=1)
        for at in others[agreement >= threshold]:
            a, b = root(int(order[at])), root(int(leaders[at]))
            if a != b:
                better, worse = (a, b) if ranks[a] < ranks[b] else (b, a)
                parent[worse] = better
    return np.array([root(i) for i in range(len(signatures))], dtype=np.int64)


def ranking(keys: Sequence[tuple[int, str]]) -> NDArray[np.int64]:
    """Ranks by (size, id): the largest first, then the smallest id. (n,) 0 is the best."""
    order = sorted(range(len(keys)), key=lambda i: (-keys[i][0], keys[i][1]))
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys))
    return ranks
