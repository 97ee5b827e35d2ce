"""Passages that occur again: spans of units, and lines. The first occurrence stays, all others are cut.

First is by the rule of `corpora` (an earlier corpus, the longest text, the smallest hash of its id), in one text the
place. After Lee et al. (2022), who cut what a suffix array finds twice over 50 tokens; here every window of that
length is hashed, which finds the same spans out of core, in memory that does not grow with the text. A window has 50
words or 100 unspaced characters (or a mixture of the same weight), wherever it stands.

A window's hash is the polynomial Σ hᵢ·Fⁱ mod 2⁶⁴ over its units' hashes, exact, from prefix sums; a second polynomial
over other hashes gives 32 bits more. Two different windows pass for equal with probability about 2⁻⁹⁰.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fledge.data.dedup.buckets import Buckets, leaders
from fledge.data.dedup.corpora import RANK, Corpora
from fledge.data.dedup.units import Units
from fledge.data.ngrams import Words64, mix

Integers = NDArray[np.int64]
_FACTORS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)  # odd
_PLACE = np.dtype([("key", "<u8"), ("check", "<u4"), ("place", "<i8"), ("at", "<u4")])
_AGAIN = np.dtype([("key", "<u8"), ("at", "<u4"), ("kept", "<i8")])


@dataclass(frozen=True)
class Windows:
    """Of each text the windows that begin at its units 0, 1, …: `ends` (M,) the unit of the text behind each, `keys`
    and `checks` (M,) their hashes; text i has those from bounds[i] to bounds[i + 1]."""

    ends: Integers
    keys: Words64
    checks: NDArray[np.uint32]
    bounds: Integers

    @classmethod
    def of(cls, texts: list[str], words: int, characters: int) -> Windows:
        """The windows of `words` words or `characters` unspaced characters. Texts shorter than one have none."""
        found = Units.of(texts)
        weight = np.r_[0, np.cumsum(np.where(found.unspaced, words, characters), dtype=np.int64)]
        ends = np.searchsorted(weight, weight[:-1] + words * characters)
        text = np.repeat(np.arange(len(texts)), found.counts)
        whole = np.flatnonzero(ends <= found.bounds[1:][text])
        ends, text = ends[whole], text[whole]
        keys = _window_hashes(found.hashes, whole, ends, _FACTORS[0])
        others = _window_hashes(mix(found.hashes ^ np.uint64(_FACTORS[1])), whole, ends, _FACTORS[1])
        bounds = np.r_[0, np.cumsum(np.bincount(text, minlength=len(texts)))]
        return cls(ends - found.bounds[text], keys, (others >> np.uint64(32)).astype(np.uint32), bounds)


def _window_hashes(hashes: Words64, starts: Integers, ends: Integers, factor: int) -> Words64:
    powers, inverses = (
        np.multiply.accumulate(np.r_[np.uint64(1), np.full(len(hashes), base, dtype=np.uint64)])
        for base in (np.uint64(factor), np.uint64(pow(factor, -1, 2**64)))
    )
    sums = np.r_[np.uint64(0), np.cumsum(hashes * powers[:-1], dtype=np.uint64)]
    return mix((sums[ends] - sums[starts]) * inverses[starts])


def repeated(corpora: Corpora) -> Iterator[tuple[Integers, Integers, Integers]]:
    """(row, at, kept) of new rows' passages that occur before; `kept` is the first one's place where that is in the
    same row, else -1. Of sketches with the columns row, length, name, and the lists key, check and (where they are not
    0, 1, …) at."""
    place_of = np.full(corpora.rows, -1, dtype=np.int64)
    ranks = np.concatenate([np.zeros(0, dtype=np.dtype(RANK)), *(
        corpora.ranked(table, np.dtype(RANK)) for table in corpora.tables(["row", "length", "name"])
    )])  # fmt: skip
    row_at = ranks["row"][np.lexsort((ranks["row"], ranks["name"], ranks["rank"]))]
    place_of[row_at] = np.arange(len(row_at))
    del ranks
    buckets = Buckets(corpora.scratch / "passages", _PLACE, 256 * corpora.rows, identity=2)
    for table in corpora.tables(["row", "key", "check", "at"]):
        keys = table["key"].combine_chunks()
        sizes = np.diff(keys.offsets.to_numpy())
        records = np.empty(sizes.sum(), dtype=_PLACE)
        records["key"] = keys.flatten().to_numpy()
        records["check"] = table["check"].combine_chunks().flatten().to_numpy()
        records["place"] = np.repeat(place_of[table["row"].to_numpy()], sizes)
        given = table["at"].combine_chunks().flatten().to_numpy()
        records["at"] = given if len(given) else _counted(sizes)
        buckets.add(records)
    for records in buckets.groups():
        best = leaders(records, ("key", "check"))
        row = row_at[records["place"]]
        again = (best != np.arange(len(best))) & (row >= corpora.first)
        kept = np.where(row == row[best], records["at"][best].astype(np.int64), -1)
        yield row[again], records["at"][again].astype(np.int64), kept[again]


def runs(corpora: Corpora) -> tuple[Integers, Integers, Integers, Integers]:
    """(row, first, last, kept) of runs of repeated windows: those that begin at the units first to last of a row;
    `kept` as in `repeated`, of the first of them. Sorted by row and place."""
    bits = max(1, corpora.rows.bit_length())
    buckets = Buckets(corpora.scratch / "runs", _AGAIN, corpora.rows, least=1)
    for row, at, kept in repeated(corpora):
        records = np.empty(len(row), dtype=_AGAIN)
        records["key"], records["at"], records["kept"] = row.astype(np.uint64) << np.uint64(64 - bits), at, kept
        buckets.add(records)
    found = [np.zeros((4, 0), dtype=np.int64)]
    for records in buckets.groups():
        row = (records["key"] >> np.uint64(64 - bits)).astype(np.int64)
        at, kept = records["at"].astype(np.int64), records["kept"]
        moves = np.where(kept[1:] >= 0, 1, 0)
        goes_on = (row[1:] == row[:-1]) & (np.diff(at) == 1) & (np.diff(kept) == moves)
        first = np.flatnonzero(np.r_[True, ~goes_on])
        last = np.r_[first[1:], len(row)] - 1
        found.append(np.stack([row[first], at[first], at[last], kept[first]]))
    row, first, last, kept = np.concatenate(found, axis=1)
    return row - corpora.first, first, last, kept


def cut_units(ends: Integers, first: Integers, last: Integers, kept: Integers) -> list[tuple[int, int]]:
    """The units of one text to cut, as (start, end), for its runs: what lies in a repeated window, but not in the
    window that stays where that overlaps. `ends` are those of the text's windows."""
    spans: list[tuple[int, int]] = []
    for a, z, stays in sorted(zip(first.tolist(), last.tolist(), kept.tolist(), strict=True)):
        start, end = a if stays < 0 else max(a, int(ends[stays])), int(ends[z])
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        elif start < end:
            spans.append((start, end))
    return spans


def _counted(sizes: Integers) -> Integers:
    """0, 1, … for each size."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
