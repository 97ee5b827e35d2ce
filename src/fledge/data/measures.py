"""What the rules of quality ask of one text, each counted when first asked for and never twice.

    for m in measures(chunk): m.word_length, m.repeated_lines, m.repeated((5, 10))

Lengths are counted in units (words, or characters of a script without spaces), shares of repetition in the units'
characters, so that white space and punctuation neither dilute them nor need splitting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fledge.data.texts import units

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fledge.data.chunk import Chunk

_BULLET = re.compile(r"[-*•●▪◦‣·–]\s*\S")  # numbered lines are steps and clauses: manuals and laws
_ELLIPSIS = re.compile(r"\.{3,}|…+")
_ENDS = tuple(".!?\"'”’…。！？；：」』）)】》")
_TOKEN = re.compile(r"\w+(?:[^\w\s,;\"-]+\w+)*|([^\w\s])\1*")  # a word with the marks inside it, or equal marks
_LETTER = re.compile(r"[^\W\d_]")
_BASE = 0x9E3779B97F4A7C15
_PARAGRAPH = re.compile(r"\n\s*\n")


def measures(chunk: Chunk) -> list[Measures]:
    """One for each row, shared by all steps; the units are those that `chunk.of_each(units)` gives others."""
    words, found = chunk.of_each(units), chunk.of_each(Measures)
    for measured, of_text in zip(found, words, strict=True):
        measured.units = of_text
    return found


class Measures:
    """Of one text."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def units(self) -> list[str]:
        return units(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """Stripped, without the empty ones."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What stands between empty lines."""
        return [part for part in map(str.strip, _PARAGRAPH.split(self.text)) if part]

    @cached_property
    def lettered(self) -> float:
        """Share of units with a letter in them."""
        return 1 - sum(map(str.isdecimal, self.units)) / len(self.units) if self.units else 0.0

    @cached_property
    def lettered_with_marks(self) -> float:
        """The same where marks of punctuation are tokens too, much as spaCy cuts English, and so datatrove."""
        tokens = [match[0] for match in _TOKEN.finditer(self.text)]
        return sum(_LETTER.search(token) is not None for token in tokens) / max(1, len(tokens))

    @cached_property
    def word_length(self) -> float:
        """Mean characters of a unit."""
        return self.characters / max(1, len(self.units))

    @cached_property
    def characters(self) -> int:
        """Of all units together."""
        return sum(map(len, self.units))

    @cached_property
    def symbols(self) -> float:
        """Hash signs or ellipses, whichever are more, per unit."""
        marks = max(self.text.count("#"), len(_ELLIPSIS.findall(self.text)))
        return marks / max(1, len(self.units))

    @cached_property
    def bullets(self) -> float:
        """Share of lines that begin with a bullet."""
        return self._share(map(_BULLET.match, self.lines))

    @cached_property
    def ellipses(self) -> float:
        """Share of lines that end in an ellipsis."""
        return self._share(line.endswith(("...", "…")) for line in self.lines)

    @cached_property
    def ended(self) -> float:
        """Share of lines that end in punctuation."""
        return self._share(line.endswith(_ENDS) for line in self.lines)

    @cached_property
    def terminated(self) -> float:
        """Share of lines that end like a sentence: a closing Latin bracket, as code has, does not count."""
        return self._share(line.endswith(_ENDS) and line[-1] != ")" for line in self.lines)

    @cached_property
    def line_breaks(self) -> float:
        """Line breaks per unit; empty lines do not count."""
        return (len(self.lines) - 1) / max(1, len(self.units))

    @cached_property
    def repeated_lines(self) -> float:
        """Share of characters in lines that stood before; headings and other short lines may recur."""
        again = duplicates([line for line in self.lines if len(line) > 10])[1]
        return again / max(1, sum(map(len, self.lines)))

    @cached_property
    def duplicate_lines(self) -> tuple[float, float]:
        """(share of lines, share of characters in lines) that stood before."""
        return self._shares(self.lines)

    @cached_property
    def duplicate_paragraphs(self) -> tuple[float, float]:
        """(share of paragraphs, share of characters in paragraphs) that stood before."""
        return self._shares(self.paragraphs)

    def short_lines(self, characters: int) -> float:
        """Share of lines of at most so many characters."""
        return self._share(len(line) <= characters for line in self.lines)

    def stop_words(self, words: frozenset[str]) -> int:
        """How many different ones of them occur."""
        return len(words.intersection(self.units))

    def top(self, n: int) -> float:
        """Share of the characters that the most frequent n-gram takes, where it occurs three times or more."""
        import numpy as np

        grams = self._grams(n)
        if len(grams) < 3:
            return 0.0
        ordered = np.sort(grams)
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        times = np.diff(starts, append=len(ordered))
        most = int(times.max())
        if most < 3:
            return 0.0
        at = np.flatnonzero(np.isin(grams, ordered[starts[times == most]]))
        longest = int((self._ends[at + n] - self._ends[at]).max())
        return min(1.0, most * longest / max(1, self.characters))

    def repeated(self, sizes: Sequence[int]) -> Iterable[tuple[int, float]]:
        """(n, share of the characters inside n-grams that stood before) for each n of `sizes`, in ascending order.

        An n-gram can only stand twice where its first m units do: every size looks at what the one before left.
        """
        import numpy as np

        left: NDArray[np.intp] | None = None  # positions of grams of the last size that occur more than once
        for n in sorted(sizes):
            grams = self._grams(n)
            at = np.arange(len(grams)) if left is None else left[left < len(grams)]
            if len(at) < 2:
                left = at[:0]
                yield n, 0.0
                continue
            order = np.argsort(grams[at])
            ordered = grams[at][order]
            starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
            sizes_of = np.diff(starts, append=len(ordered))
            several = np.zeros(len(at), dtype=bool)
            several[order[np.repeat(sizes_of > 1, sizes_of)]] = True
            left = at[several]
            several[np.minimum.reduceat(order, starts)] = False  # the first of equal grams is new
            yield n, self._covered(at[several], n)

    def _covered(self, starts: NDArray[np.intp], n: int) -> float:
        """Share of the characters inside the n-grams that begin there."""
        import numpy as np

        if not len(starts):
            return 0.0
        change = np.zeros(len(self.units) + 1, dtype=np.int64)
        change[starts] += 1
        change[starts + n] -= 1
        inside = np.cumsum(change)[:-1] > 0
        return float(np.diff(self._ends)[inside].sum() / max(1, self.characters))

    def _grams(self, n: int) -> Any:
        """(max(units - n + 1, 0),) a number for each n-gram, equal for equal ones, in order.

        Horner's rule modulo 2⁶⁴, from the size that was asked for last: two of N different grams collide with
        probability about N² / 2⁶⁵.
        """
        import numpy as np

        size, grams = self._last
        if size > n:
            size, grams = 1, self._numbers
        for k in range(size, min(n, len(self.units))):
            grams = grams[:-1] * np.uint64(_BASE) + self._numbers[k:]
        if n > len(self.units):
            return grams[:0]
        self._last = n, grams
        return grams

    @cached_property
    def _last(self) -> tuple[int, Any]:
        return 1, self._numbers

    @cached_property
    def _numbers(self) -> Any:
        """(units,) a number for each unit, well mixed, equal for equal ones: their places in the text's vocabulary."""
        import numpy as np

        from fledge.data.ngrams import mix

        place = {unit: number for number, unit in enumerate(dict.fromkeys(self.units))}
        return mix(
            np.fromiter(map(place.__getitem__, self.units), dtype=np.uint64, count=len(self.units)) + np.uint64(1)
        )

    @cached_property
    def _ends(self) -> Any:
        """(units + 1,) where each unit begins, counted in characters of units; last, where all end."""
        import numpy as np

        ends = np.zeros(len(self.units) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, self.units), dtype=np.int64, count=len(self.units)), out=ends[1:])
        return ends

    def _share(self, tests: Iterable[object]) -> float:
        return sum(map(bool, tests)) / max(1, len(self.lines))

    @staticmethod
    def _shares(parts: list[str]) -> tuple[float, float]:
        times, characters = duplicates(parts)
        return times / max(1, len(parts)), characters / max(1, sum(map(len, parts)))


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts stood before, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    times = characters = 0
    for part in parts:
        if part in seen:
            times += 1
            characters += len(part)
        seen.add(part)
    return times, characters
