"""MinHash with locality-sensitive hashing: which texts are nearly the same.

Broder (1997); the setting is FineWeb's (Penedo et al., 2024): 5-grams, 14 bands of 8 rows, so that two texts of
Jaccard similarity s meet in some band with probability 1 - (1 - s⁸)¹⁴: 0.92 at s = 0.8, 0.05 at s = 0.5. Unlike
there, texts that meet are joined only if their whole signatures agree in at least `threshold` of the 112 places
(0 joins all that meet).

The hash functions are x ↦ aᵢ·(x + dⱼ) mod 2³² with odd aᵢ, for all i of band j: permutations of the 32-bit words, one
exact multiplication for each shingle (a shingle's 32 bits are the upper ones of a well mixed 64-bit hash). Linear
permutations are min-wise independent enough for this (Bohman, Cooper and Frieze, 2000).

The limit is arithmetic: 112 multiplications and 112 comparisons a shingle, on 16 lanes of AVX-512 at least 7 to 14
cycles, 2 to 4 ns. NumPy writes the products and reads them again in the second-level cache: 17 ns on one core of the
machine where 64-bit products shingle by shingle took 90. Finding and hashing the units takes 30 ns each before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fledge.data.dedup.buckets import Buckets, leaders
from fledge.data.dedup.corpora import RANK, Corpora, components, unique_pairs
from fledge.data.dedup.units import Units
from fledge.data.ngrams import Words64, mix

if TYPE_CHECKING:
    from pathlib import Path

Signatures = NDArray[np.uint32]
Integers = NDArray[np.int64]
_BLOCK = 2**16  # shingles at once: they and their products stay in the cache
_PAIRS = 2**12  # pairs whose signatures are compared at once
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class MinHash:
    """Signatures of `bands * rows` hash functions drawn from `seed`."""

    def __init__(self, ngram: int = 5, bands: int = 14, rows: int = 8, seed: int = 1) -> None:
        self.ngram, self.bands, self.rows = ngram, bands, rows
        draws = mix(np.arange(1, bands * (rows + 1) + 1, dtype=np.uint64) * _FACTOR + np.uint64(seed))
        words = (draws >> np.uint64(32)).astype(np.uint32)
        self.a = words[bands:] | np.uint32(1)  # (bands * rows,), odd
        self.d = words[:bands]  # (bands,)

    @property
    def places(self) -> int:
        """K, how many numbers a signature has."""
        return self.bands * self.rows

    def signatures(self, texts: list[str], salt: Words64 | None = None) -> tuple[Integers, Signatures]:
        """The texts that have a unit (m,), and their signatures (m, K). With `salt` (n,), texts under different
        numbers have nothing in common."""
        grams, bounds = Units.of(texts).grams(self.ngram)
        if salt is not None:
            grams = mix(grams + np.repeat(salt, np.diff(bounds)))
        rows = np.flatnonzero(np.diff(bounds))
        return rows, self.of((grams >> np.uint64(32)).astype(np.uint32), np.r_[bounds[rows], len(grams)])

    def of(self, grams: NDArray[np.uint32], bounds: Integers) -> Signatures:
        """The signatures (m, K) of m sets of shingles: those from bounds[i] to bounds[i + 1], at least one each."""
        count = len(bounds) - 1
        least = np.empty((self.places, count), dtype=np.uint32)
        start = 0
        while start < count:
            end = max(start + 1, int(np.searchsorted(bounds, bounds[start] + _BLOCK, side="right")) - 1)
            block, firsts = grams[bounds[start] : bounds[end]], bounds[start:end] - bounds[start]
            moved, products = np.empty_like(block), np.empty_like(block)
            for place in range(self.places):
                if place % self.rows == 0:
                    np.add(block, self.d[place // self.rows], out=moved)
                np.multiply(moved, self.a[place], out=products)
                np.minimum.reduceat(products, firsts, out=least[place, start:end])
            start = end
        return np.ascontiguousarray(least.T)

    def bands_of(self, signatures: Signatures) -> Words64:
        """(n, bands) one 64-bit key for each band of each signature (n, K); bands share no key."""
        parts = signatures.reshape(len(signatures), self.bands, self.rows)
        keys = np.broadcast_to(np.arange(self.bands, dtype=np.uint64), parts.shape[:2])
        for i in range(self.rows):
            keys = keys * _FACTOR + parts[:, :, i]
        return mix(keys)


def clusters(minhash: MinHash, corpora: Corpora, threshold: float) -> tuple[Integers, Integers]:
    """The rows that have a near copy, sorted, and for each a label of its cluster.

    Of sketches with the columns row, length, name and signature. Two rows that share a band are joined when their
    signatures agree in `threshold` of their places; a band's members are compared with the best of them, which
    depends on the texts and ids alone.
    """
    pairs = _meeting(minhash, corpora)
    if threshold > 0 and len(pairs):
        pairs = _agreeing(minhash, corpora, pairs, threshold)
    return components(pairs)


def _meeting(minhash: MinHash, corpora: Corpora) -> Integers:
    """(m, 2) each row that shares a band with a better one, and the best that does; each pair once, sorted."""
    dtype = np.dtype([("key", "<u8"), *RANK])
    buckets = Buckets(corpora.scratch / "bands", dtype, corpora.rows * minhash.bands)
    for table in corpora.tables(["row", "length", "name", "bands"]):
        if table.num_rows:
            records = np.repeat(corpora.ranked(table, dtype), minhash.bands)
            records["key"] = fixed_width(table["bands"], minhash.bands, np.uint64).ravel()
            buckets.add(records)
    found: list[Integers] = []
    for records in buckets.groups():
        best = records["row"][leaders(records, ("key",))]
        pairs = np.stack([records["row"], best], axis=1)[records["row"] != best]
        found.append(pairs[(pairs >= corpora.first).any(axis=1)])  # earlier corpora are not compared with themselves
        if sum(map(len, found)) > 2 * len(found[0]) + _PAIRS:
            found = [unique_pairs(found)]
    return unique_pairs(found)


def _agreeing(minhash: MinHash, corpora: Corpora, pairs: Integers, threshold: float) -> Integers:
    """The pairs whose signatures agree in enough places. The signatures needed go to a file of their own."""
    rows, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(-1, 2)
    file: Path = corpora.scratch / "signatures"
    with file.open("wb") as out:
        for table, at in corpora.where(rows, ["signature"]):
            fixed_width(table["signature"], minhash.places, np.uint32)[at].tofile(out)
    agree = np.zeros(len(pairs), dtype=np.bool_)
    for start in range(0, len(pairs), _PAIRS):
        block = slice(start, start + _PAIRS)
        signatures = np.memmap(file, dtype=np.uint32, mode="r", shape=(len(rows), minhash.places))
        a, b = (signatures[ends[block, side]] for side in (0, 1))
        agree[block] = (a == b).mean(axis=1) >= threshold
        del signatures  # unmapped: what was read of it leaves memory
    file.unlink()
    return pairs[agree]


def fixed_width(column: Any, width: int, dtype: type[np.generic]) -> NDArray[Any]:
    """(n, width) a column of fixed-size binary as numbers, without a copy where it lies in one piece."""
    whole = column.combine_chunks()
    flat = np.frombuffer(whole.buffers()[1], dtype=dtype)
    return flat[whole.offset * width : (whole.offset + len(whole)) * width].reshape(-1, width)
