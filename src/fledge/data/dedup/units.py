"""The units of many texts as one array of hashes, without a Python object for any of them.

    found = Units.of(texts)
    found.hashes[found.bounds[i] : found.bounds[i + 1]]        # those of text i, one for each of units(texts[i])

The units are those of `data.texts.units`, found by table: every code point has a folded form (NFKC, then case) and a
class (word, unspaced character, neither). The few texts in which a character meets another one on the way (combining
marks, ligatures, ß) are normalised by `unicodedata` first. ASCII text never leaves its bytes.

A unit's hash is a chain of bijections over its UTF-8, eight bytes at a time: units of up to eight bytes never collide,
others with probability 2⁻⁶⁴ a pair. It is not made to withstand an attacker.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fledge.data.ngrams import Words64, mix
from fledge.data.texts import UNIT, UNSPACED

Bools: TypeAlias = NDArray[np.bool_]
Integers: TypeAlias = NDArray[np.int64]
Points: TypeAlias = NDArray[np.uint32]
_KNOWN = 0x34000  # neither a letter nor a digit lies behind
_HARD = np.uint32(0xFFFFFFFF)  # folds to several characters, or together with its neighbour
_SEED = np.uint64(0x9E3779B97F4A7C15)
_WORD, _SINGLE = 1, 2
_BLOCK = 2**15  # units hashed at once: they stay in the cache


@dataclass(frozen=True)
class Units:
    """`hashes` (N,) of all units in order; `unspaced` (N,) whether each is a single unspaced character; `bounds`
    (n + 1,): text i has the units from bounds[i] to bounds[i + 1]."""

    hashes: Words64
    unspaced: Bools
    bounds: Integers

    @classmethod
    def of(cls, texts: Sequence[str]) -> Units:
        """The units of each text."""
        plain = np.fromiter(map(str.isascii, texts), dtype=np.bool_, count=len(texts))
        found: list[tuple[Integers, Units]] = []
        for rows, read in ((np.flatnonzero(plain), _ascii), (np.flatnonzero(~plain), _beyond_ascii)):
            if len(rows):
                found += read(rows, [texts[row] for row in rows.tolist()])
        return _in_order(found, len(texts))

    @property
    def counts(self) -> Integers:
        """(n,) units of each text."""
        return np.diff(self.bounds)

    def grams(self, n: int) -> tuple[Words64, Integers]:
        """One hash for each run of n units of each text, and where each text's begin (as `bounds`). A text of fewer
        units is one gram. (Horner's rule; the units' hashes are well mixed, so their sums are.)"""
        counts = self.counts
        sizes = np.where(counts >= n, counts - n + 1, counts > 0)
        bounds = np.r_[0, np.cumsum(sizes)]
        padded = np.r_[self.hashes, np.zeros(n, dtype=np.uint64)]
        at = np.arange(bounds[-1]) + np.repeat(self.bounds[:-1] - bounds[:-1], sizes)
        grams = _polynomial(padded, n)[at]
        for count in range(1, n):
            short = np.flatnonzero(counts == count)
            if len(short):
                units = padded[self.bounds[short][:, None] + np.arange(count)]
                grams[bounds[short]] = _polynomial(units.T, count)[0]
        return grams, bounds


def _polynomial(hashes: Words64, n: int) -> Words64:
    """Σ hashes[i + j] · F^(n - 1 - j), for all i."""
    total = hashes[: len(hashes) - n + 1].copy()
    for j in range(1, n):
        total *= _SEED
        total += hashes[j : len(hashes) - n + 1 + j]
    return total


def _in_order(found: list[tuple[Integers, Units]], count: int) -> Units:
    """Units of several groups of rows as those of the rows 0 to count."""
    if len(found) == 1:
        return found[0][1]
    sizes = np.zeros(count, dtype=np.int64)
    for rows, part in found:
        sizes[rows] = part.counts
    bounds = np.r_[0, np.cumsum(sizes)]
    hashes, unspaced = np.empty(bounds[-1], dtype=np.uint64), np.empty(bounds[-1], dtype=np.bool_)
    for rows, part in found:
        to = np.arange(len(part.hashes)) + np.repeat(bounds[rows] - part.bounds[:-1], part.counts)
        hashes[to], unspaced[to] = part.hashes, part.unspaced
    return Units(hashes, unspaced, bounds)


def _ascii(rows: Integers, texts: list[str]) -> list[tuple[Integers, Units]]:
    data = _joined(texts).encode("ascii").translate(_ascii_table())
    words = np.frombuffer(data, dtype=np.uint8) != 0
    starts, ends = _edges(words)
    bounds = np.searchsorted(starts, _begins(texts))
    return [(rows, Units(_hash(data, starts, ends), np.zeros(len(starts), dtype=np.bool_), bounds))]


def _beyond_ascii(rows: Integers, texts: list[str]) -> list[tuple[Integers, Units]]:
    points = _points(texts)
    folded = _fold_table()[points]
    hard = np.flatnonzero(folded == _HARD)
    if not len(hard):
        return [(rows, _of_points(folded, _begins(texts)))]
    begins = _begins(texts)
    which = np.zeros(len(texts), dtype=np.bool_)
    which[np.searchsorted(begins, hard, side="right") - 1] = True
    normal = [unicodedata.normalize("NFKC", texts[row]).casefold() for row in np.flatnonzero(which)]
    easy = [texts[row] for row in np.flatnonzero(~which)]
    return [
        (rows[which], _of_points(_points(normal), _begins(normal))),
        (rows[~which], _of_points(folded[~np.repeat(which, np.diff(begins))], _begins(easy))),
    ]


def _of_points(points: Points, begins: Integers) -> Units:
    """Units of folded code points; text i begins at begins[i]."""
    classes = _class_table()[points]
    words, singles = classes == _WORD, classes == _SINGLE
    starts, ends = _edges(words)
    data = points[words].astype("<u4").tobytes().decode("utf-32-le").encode()  # the words, one behind the other
    place = np.flatnonzero((np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80)  # where each code point's bytes begin
    bounds = np.append(place, len(data))[np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(ends - starts)])]
    of_words = _hash(data, bounds[:-1], bounds[1:])
    if not singles.any():
        return Units(of_words, np.zeros(len(starts), dtype=np.bool_), np.searchsorted(starts, begins))
    opens = singles.copy()
    opens[starts] = True
    starts = np.flatnonzero(opens)
    unspaced = singles[starts]
    hashes = np.empty(len(starts), dtype=np.uint64)
    hashes[unspaced] = _single_table()[points[starts[unspaced]]]
    hashes[~unspaced] = of_words
    return Units(hashes, unspaced, np.searchsorted(starts, begins))


def _edges(inside: Bools) -> tuple[Integers, Integers]:
    """Where runs of True start, and where they end (one behind the last)."""
    change = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    return change[::2], change[1::2]


def hash_each(texts: Sequence[str]) -> Words64:
    """(n,) one hash for each text as it is: as a unit is hashed, but for its case."""
    joined = "".join(texts)
    data = joined.encode("utf-8", "surrogatepass")
    sizes = map(len, texts if len(data) == len(joined) else (t.encode("utf-8", "surrogatepass") for t in texts))
    ends = np.cumsum(np.fromiter(sizes, dtype=np.int64, count=len(texts)))
    return _hash(data, ends - np.diff(ends, prepend=0), ends)


def _hash(data: bytes, starts: Integers, ends: Integers) -> Words64:
    """One hash for each run of bytes."""
    data += bytes(8)
    eight = np.ndarray((len(data) - 7,), dtype="<u8", buffer=data, strides=(1,))  # the 8 bytes from each byte on
    hashes = np.empty(len(starts), dtype=np.uint64)
    for low in range(0, len(starts), _BLOCK):
        block = slice(low, low + _BLOCK)
        hashes[block] = _hash_block(eight, starts[block], ends[block])
    return hashes


def _hash_block(eight: Words64, starts: Integers, ends: Integers) -> Words64:
    left = ends - starts
    hashes = mix((eight[starts] & _masks()[np.minimum(left, 8)]) ^ _SEED)
    longer = np.flatnonzero(left > 8)
    done = 8
    while len(longer):
        left_of = left[longer] - done
        piece = eight[starts[longer] + done] & _masks()[np.minimum(left_of, 8)]
        hashes[longer] = mix(hashes[longer] ^ piece)
        longer = longer[left_of > 8]
        done += 8
    return hashes


def _joined(texts: list[str]) -> str:
    return "\n".join([*texts, ""])


def _begins(texts: list[str]) -> Integers:
    """(n + 1,) where each text begins among the characters of `_joined`, and where the last one ends."""
    ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) + 1)
    return np.concatenate([np.zeros(1, dtype=np.int64), ends])


def _points(texts: list[str]) -> Points:
    points = np.frombuffer(_joined(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return np.asarray(np.minimum(points, np.uint32(_KNOWN - 1)))


@lru_cache(maxsize=1)
def _masks() -> Words64:
    """The low n bytes, for n from 0 to 8."""
    return np.array([2 ** (8 * n) - 1 for n in range(9)], dtype=np.uint64)


@lru_cache(maxsize=1)
def _ascii_table() -> bytes:
    """Lower case for letters and digits, 0 for the rest."""
    return bytes(ord(chr(i).casefold()) if i < 128 and chr(i).isalnum() else 0 for i in range(256))


@lru_cache(maxsize=1)
def _class_table() -> NDArray[np.uint8]:
    """What a folded code point is: 0, _WORD or _SINGLE, as `texts.units` sees it."""
    table = np.zeros(_KNOWN, dtype=np.uint8)
    whole = "".join(map(chr, range(_KNOWN)))
    for kind, runs in ((_WORD, r"[^\W_]+"), (_SINGLE, f"[{UNSPACED}]+")):
        for match in re.finditer(runs, whole):
            table[match.start() : match.end()] = kind
    return table


@lru_cache(maxsize=1)
def _single_table() -> Words64:
    """The hash of each unspaced character, 0 elsewhere."""
    table = np.zeros(_KNOWN, dtype=np.uint64)
    singles = np.flatnonzero(_class_table() == _SINGLE)
    table[singles] = hash_each([chr(point) for point in singles.tolist()])
    return table


@lru_cache(maxsize=1)
def _fold_table() -> Points:
    """NFKC and case folding of every code point alone, _HARD where that is not the whole story."""
    table = np.arange(_KNOWN, dtype=np.uint32)
    seconds = _second_ones()
    for low, high in ((0, 0x3400), (0xA000, 0xAC00), (0xD7A4, 0xD800), (0xE000, 0x20000), (0x2F800, 0x2FA20)):
        for start in range(low, high, 128):  # what lies between stays as it is, and most of these, too
            block = "\n".join(map(chr, range(start, min(start + 128, high))))
            if unicodedata.normalize("NFKC", block).casefold() != block or not seconds.isdisjoint(block):
                for point in range(start, min(start + 128, high)):
                    table[point] = _folded(chr(point), seconds)
    return table


def _folded(character: str, seconds: frozenset[str]) -> int | np.uint32:
    normal = unicodedata.normalize("NFKC", character)
    folded = normal.casefold()
    return ord(folded) if len(folded) == 1 and normal not in seconds else _HARD


@lru_cache(maxsize=1)
def _second_ones() -> frozenset[str]:
    """Characters that may melt into the one before them, or change places with it."""
    found = {chr(point) for point in (*range(0x1160, 0x1200), *range(0xD7B0, 0xD800))}  # Hangul's vowels and finals
    for character in map(chr, range(0x80, 0x20000)):
        if unicodedata.combining(character):
            found.add(character)
        elif said := unicodedata.decomposition(character):
            parts = said.split()
            if len(parts) == 2 and parts[0][0] != "<":
                found.add(chr(int(parts[1], 16)))
    return frozenset(found)


def positions(text: str) -> list[tuple[int, int]]:
    """Where in the text each of its units stands: (start, end), as slices. One for each of `units(text)`."""
    if text.isascii():
        return [match.span() for match in UNIT.finditer(text)]
    clusters = _clusters(text)
    normal = [unicodedata.normalize("NFKC", text[start:end]).casefold() for start, end in clusters]
    owners = [cluster for cluster, said in zip(clusters, normal, strict=True) for _ in said]
    found = UNIT.finditer("".join(normal))
    return [(owners[match.start()][0], owners[match.end() - 1][1]) for match in found]


def _clusters(text: str) -> list[tuple[int, int]]:
    """The text in pieces that are normalised each by itself."""
    edges = [0]
    for i in range(1, len(text)):
        if text[i].isascii():
            edges.append(i)
        elif not unicodedata.combining(text[i]):
            before, behind = (unicodedata.normalize("NFKC", part) for part in (text[edges[-1] : i], text[i]))
            if unicodedata.normalize("NFKC", text[edges[-1] : i + 1]) == before + behind:
                edges.append(i)
    return list(zip(edges, [*edges[1:], len(text)], strict=True))
