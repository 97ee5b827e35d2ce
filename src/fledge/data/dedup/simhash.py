"""SimHash: 64 bits of a text that differ in few places where texts differ little (Charikar, 2002).

Each n-gram votes on each of the 64 bits with its own hash, as often as it occurs; the bit is what most say. Texts whose
bits differ in at most k places are joined. Two words that differ in at most k places are equal in at least b - k of b
blocks, so that every pair is found by sorting by each choice of b - k blocks (Manku, Jain and Das Sarma, 2007).
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from fledge.data.dedup.buckets import Buckets, leaders, new_group
from fledge.data.dedup.corpora import RANK, Corpora, components, unique_pairs
from fledge.data.dedup.units import Units
from fledge.data.ngrams import Words64, mix

Integers = NDArray[np.int64]
_BLOCK = 2**15  # grams at once: their bits take eight bytes each


def simhashes(texts: list[str], ngram: int, salt: Words64 | None = None) -> tuple[Integers, Words64]:
    """The texts that have a unit (m,), and 64 bits of each (m,)."""
    grams, bounds = Units.of(texts).grams(ngram)
    rows = np.flatnonzero(np.diff(bounds))
    bounds = np.r_[bounds[rows], len(grams)]
    bits = np.empty((len(rows), 64), dtype=np.uint8)
    start = 0
    while start < len(rows):
        end = max(start + 1, int(np.searchsorted(bounds, bounds[start] + _BLOCK, side="right")) - 1)
        voters = mix(grams[bounds[start] : bounds[end]]).astype("<u8")
        votes = np.unpackbits(voters.view(np.uint8).reshape(-1, 8), axis=1)
        yes = np.add.reduceat(votes, bounds[start:end] - bounds[start], axis=0, dtype=np.int32)
        bits[start:end] = 2 * yes > np.diff(bounds)[start:end, None]
        start = end
    words = np.packbits(bits, axis=1).view("<u8").ravel().astype(np.uint64)
    return rows, words if salt is None else words ^ mix(salt[rows])


def clusters(corpora: Corpora, distance: int, blocks: int) -> tuple[Integers, Integers]:
    """The rows that have a near copy, sorted, and for each a label of its cluster. Of sketches with the columns row,
    length, name and simhash. `blocks` is more than `distance`."""
    dtype = np.dtype([("key", "<u8"), ("bits", "<u8"), *RANK])
    edges = [64 * i // blocks for i in range(blocks + 1)]
    masks = [2**high - 2**low for low, high in pairwise(edges)]
    tables = [np.uint64(sum(chosen)) for chosen in combinations(masks, blocks - distance)]
    buckets = Buckets(corpora.scratch / "blocks", dtype, corpora.rows * len(tables))
    for lines in corpora.tables(["row", "length", "name", "simhash"]):
        records = corpora.ranked(lines, dtype)
        records["bits"] = lines["simhash"].to_numpy()
        for number, mask in enumerate(tables):
            records["key"] = mix((records["bits"] & mask) ^ mix(np.full(1, number, dtype=np.uint64)))
            buckets.add(records.copy())
    found: list[Integers] = []
    for records in buckets.groups():
        found = [unique_pairs([*found, *_near(records, distance)])]
    pairs = unique_pairs(found)
    return components(pairs[(pairs >= corpora.first).any(axis=1)])


def _near(records: NDArray[np.void], distance: int) -> list[Integers]:
    """Pairs of rows of one key whose bits differ in few places: equal ones with the best of them, those with each
    other."""
    best = leaders(records, ("key", "bits"))
    pairs = [np.stack([records["row"], records["row"][best]], axis=1)[best != np.arange(len(best))]]
    alone = records[new_group(records, ("key", "bits"))]
    step, left = 1, np.arange(len(alone) - 1)
    while len(left):
        left = left[alone["key"][left] == alone["key"][left + step]]
        close = left[np.bitwise_count(alone["bits"][left] ^ alone["bits"][left + step]) <= distance]
        pairs.append(np.stack([alone["row"][close], alone["row"][close + step]], axis=1))
        step += 1
        left = left[left + step < len(alone)]
    return pairs
