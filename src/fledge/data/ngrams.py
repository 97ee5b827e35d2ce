"""N-grams as 64-bit integers, so that counting and comparing them is a matter of sorted arrays.

All arithmetic is exact and wraps modulo 2⁶⁴; nothing depends on Python's per-process string hash. Two different
n-grams of a corpus of N collide with probability about N² / 2⁶⁵.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Words64 = NDArray[np.uint64]
_BASE = np.uint64(0x9E3779B97F4A7C15)


def hash64(text: str) -> int:
    """A 64-bit hash of a text (BLAKE2b), the same everywhere and always."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


_of_unit = lru_cache(maxsize=2**20)(hash64)  # units repeat: a corpus has far fewer kinds than tokens


def unit_hashes(units: Sequence[str]) -> Words64:
    """(n,) one hash per unit."""
    return np.fromiter(map(_of_unit, units), dtype=np.uint64, count=len(units))


def ngrams(hashes: Words64, n: int) -> Words64:
    """(max(len - n + 1, 0),) one hash per run of n units, in order."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for i in range(n):  # Horner's rule: position matters
        total = total * _BASE + hashes[i : i + count]
    return mix(total)


def mix(x: Words64) -> Words64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection whose output bits are all well mixed."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shingles(hashes: Words64, n: int) -> Words64:
    """The set of n-grams, sorted; of a text shorter than n units, the one gram that it is. Empty for no units."""
    if not len(hashes):
        return np.zeros(0, dtype=np.uint64)
    return np.unique(ngrams(hashes, min(n, len(hashes))))


def jaccard(a: Words64, b: Words64) -> float:
    """|a ∩ b| / |a ∪ b| of two sorted sets; 0 when both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 0.0


def places(sorted_set: Words64, values: Words64) -> NDArray[np.intp]:
    """Where in the sorted set those of the values stand that it holds."""
    if not len(sorted_set) or not len(values):
        return np.zeros(0, dtype=np.intp)
    at = np.minimum(np.searchsorted(sorted_set, values), len(sorted_set) - 1)
    return np.asarray(at[sorted_set[at] == values])


def union(parts: Iterable[Words64]) -> Words64:
    """The sorted set of all values of several arrays."""
    arrays = list(parts)
    return np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, dtype=np.uint64)
