"""Ways to spoil a text, for pairs in which the right one is known: pure functions of the text and a generator.

    shuffle   words (Chinese: characters) change places within their clause
    reorder   clauses change places
    drop      a quarter of the words or characters is missing
    repeat    a quarter of them stands twice
    swap      another text of about the same length (`nearest`)

`drop` shortens by what `repeat` lengthens and the others keep the length, so that over all of them length tells
nothing. Punctuation stays where it is. A function gives None where the text is too short to be spoilt.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from random import Random
from typing import Literal, get_args

from fledge.data.texts import UNSPACED

Corruption = Literal["shuffle", "reorder", "drop", "repeat", "swap"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)

_UNIT = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’-][^\W{UNSPACED}]+)*")
_CLAUSE = re.compile(r"[^，。；！？：、,.;!?:\n]+")
SHARE = 0.25
_FEWEST, _TRIES = 4, 8


def corrupt(text: str, kind: str, rng: Random) -> str | None:
    """`text` spoilt in one of the ways that need no other text; None where that leaves it as it was."""
    spoil = _WAYS[kind]
    for _ in range(_TRIES):
        spoilt = spoil(text, rng)
        if spoilt is not None and spoilt != text:
            return spoilt
    return None


def shuffle(text: str, rng: Random) -> str | None:
    """Units trade places within their clauses."""
    units = list(_UNIT.finditer(text))
    if len(units) < _FEWEST:
        return None
    words = [unit[0] for unit in units]
    for clause in _CLAUSE.finditer(text):
        inside = [i for i, unit in enumerate(units) if clause.start() <= unit.start() < clause.end()]
        moved = rng.sample(inside, len(inside))
        for place, word in zip(inside, [words[i] for i in moved], strict=True):
            words[place] = word
    return _rebuilt(text, [unit.span() for unit in units], words)


def reorder(text: str, rng: Random) -> str | None:
    """Clauses trade places; the marks between them stay."""
    clauses = [clause for clause in _CLAUSE.finditer(text) if _UNIT.search(clause[0])]
    if len(clauses) < 2:
        return None
    bodies = [clause[0].strip() for clause in clauses]
    spans = [(c.start() + len(c[0]) - len(c[0].lstrip()), c.start() + len(c[0].rstrip())) for c in clauses]
    return _rebuilt(text, spans, rng.sample(bodies, len(bodies)))


def drop(text: str, rng: Random) -> str | None:
    """A quarter of the units goes, with the space before each."""
    units = list(_UNIT.finditer(text))
    if len(units) < _FEWEST:
        return None
    gone = set(rng.sample(range(len(units)), max(1, round(SHARE * len(units)))))
    spans = [(u.start() - _spaced(text, u), u.end()) for i, u in enumerate(units) if i in gone]
    return _rebuilt(text, spans, [""] * len(spans)).strip() or None


def repeat(text: str, rng: Random) -> str | None:
    """A quarter of the units stands twice."""
    units = list(_UNIT.finditer(text))
    if len(units) < _FEWEST:
        return None
    twice = sorted(rng.sample(range(len(units)), max(1, round(SHARE * len(units)))))
    doubled = [units[i][0] + " " * _spaced(text, units[i]) + units[i][0] for i in twice]
    return _rebuilt(text, [units[i].span() for i in twice], doubled)


def _spaced(text: str, unit: re.Match[str]) -> bool:
    """Whether a space stands before the unit."""
    return text[unit.start() - 1 : unit.start()] == " "


_WAYS: dict[str, Callable[[str, Random], str | None]] = {
    "shuffle": shuffle, "reorder": reorder, "drop": drop, "repeat": repeat,
}  # fmt: skip


def nearest(text: str, by_length: Sequence[str], rng: Random, window: int = 8) -> str | None:
    """One of the texts nearest to `text` in length, on either side, and not `text` itself; `by_length` is sorted so."""
    at = bisect_left(by_length, (len(text), text), key=lambda other: (len(other), other))
    near = [other for other in by_length[max(0, at - window) : at + window + 1] if other != text]
    return rng.choice(near) if near else None


def _rebuilt(text: str, spans: Sequence[tuple[int, int]], parts: Sequence[str]) -> str:
    """`text` with every span replaced by its part."""
    out, at = [], 0
    for (start, end), part in zip(spans, parts, strict=True):
        out += [text[at:start], part]
        at = end
    return "".join([*out, text[at:]])
