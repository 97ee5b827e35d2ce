"""Measures of a text's quality, the same for spaced and unspaced scripts, and the limits each language sets them.

The rules are Gopher's (Rae et al., 2021, table A1), C4's (Raffel et al., 2020) and FineWeb's (Penedo et al., 2024),
with one difference: a length is counted in units (words, or characters of a script without spaces), and Chinese marks
end a line as well as Latin ones. The thresholds for English are the papers', those for repeated lines Gopher's. Those
for Chinese take about two characters for a word: n-grams are twice as long, a line is short from 12 characters down
instead of 30; and as formal prose lives on formulas (a fifth of a Chinese law's characters, of some laws half, stand
in 10-grams that stood before), more may recur.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fledge.data.texts import HAN, units

_LETTER = re.compile(r"[^\W\d_]")
_HAN = re.compile(f"[{HAN}]")
_BULLET = re.compile(r"\s*(?:[-*•●▪◦‣·–]|\d{1,3}[.)、])\s*\S")
_ENDS = tuple(".!?\"'”’…。！？；：」』）)】》")
_CHINESE_STOP = frozenset("的一是了在有不为和以之其者于与而所及或")
_ENGLISH_STOP = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])


@dataclass(frozen=True)
class Limits:
    """Thresholds of one kind of script. Shares are of 1."""

    min_units: int
    max_units: int
    word_length: tuple[float, float] | None  # mean characters of a word
    min_lettered: float  # share of units with a letter in them
    max_symbols: float  # '#' and '…' per unit
    max_bullets: float  # lines that begin with a bullet or a number
    max_ellipses: float  # lines that end in an ellipsis
    min_stop_words: int  # different ones; 0 where we have no list
    stop_words: frozenset[str]
    min_ended: float  # lines that end in punctuation
    short_line: int  # characters
    max_short: float
    max_lines_per_unit: float
    max_repeated_lines: float  # characters in lines that occurred before
    top: Mapping[int, float] = field(default_factory=dict)  # n → share of the most frequent n-gram
    repeated: Mapping[int, float] = field(default_factory=dict)  # n → share inside n-grams that stood before


ENGLISH = Limits(
    50, 100_000, (3, 10), 0.8, 0.1, 0.9, 0.3, 2, _ENGLISH_STOP, 0.12, 30, 0.67, 0.3, 0.2,
    {2: 0.20, 3: 0.18, 4: 0.16}, {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
)  # fmt: skip
SPACED = Limits(
    50, 100_000, (2, 14), 0.8, 0.1, 0.9, 0.3, 0, frozenset(), 0.12, 30, 0.67, 0.3, 0.2, ENGLISH.top, ENGLISH.repeated
)
CHINESE = Limits(
    80, 500_000, None, 0.8, 0.1, 0.9, 0.3, 2, _CHINESE_STOP, 0.12, 12, 0.67, 0.3, 0.2,
    {4: 0.20, 6: 0.18, 8: 0.16}, {10: 0.50, 16: 0.40, 20: 0.35},
)  # fmt: skip


def limits_for(language: str, text: str) -> Limits:
    """The limits of a language; of an unnamed one, what the script says."""
    if language == "zh" or (not language and 4 * len(_HAN.findall(text)) > len(text)):
        return CHINESE
    return ENGLISH if language == "en" else SPACED


class Measures:
    """What the rules ask of one text, each counted when first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def units(self) -> list[str]:
        return units(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    def lines_that(self, test: object) -> float:
        """Share of the lines on which `test(line)` holds."""
        assert callable(test)
        return sum(bool(test(line)) for line in self.lines) / max(1, len(self.lines))

    @cached_property
    def lettered(self) -> float:
        kinds = Counter(self.units)
        return sum(n for unit, n in kinds.items() if _LETTER.search(unit)) / max(1, len(self.units))

    @cached_property
    def word_length(self) -> float:
        return sum(map(len, self.units)) / max(1, len(self.units))

    @cached_property
    def symbols(self) -> float:
        marks = self.text.count("#") + self.text.count("…") + len(re.findall(r"\.\.\.", self.text))
        return marks / max(1, len(self.units))

    @cached_property
    def repeated_lines(self) -> float:
        """Share of characters in lines that stood before; headings and other short lines may recur."""
        seen: set[str] = set()
        again = 0
        for line in self.lines:
            again += len(line) * (line in seen and len(line) > 10)
            seen.add(line)
        return again / max(1, sum(map(len, self.lines)))

    def repetition(self, limits: Limits) -> Iterator[tuple[str, float, float]]:
        """(rule, share, its limit) for every n-gram length."""
        from fledge.data.ngrams import ngrams, repeated_share, top_share, unit_hashes

        hashes = unit_hashes(self.units)
        for n, limit in limits.top.items():
            yield f"top {n}-gram", top_share(ngrams(hashes, n), n), limit
        for n, limit in limits.repeated.items():
            yield f"repeated {n}-grams", repeated_share(ngrams(hashes, n), n), limit


RULES = (
    "too_short", "too_long", "word_length", "letters", "symbols", "bullets", "ellipses", "stop_words", "line_ends",
    "short_lines", "line_breaks", "repeated_lines", "repetition", "placeholder",
)  # fmt: skip


def broken_rule(
    text: str, language: str, skip: frozenset[str] = frozenset(), min_units: int | None = None
) -> tuple[str, str] | None:
    """The first rule for documents that the text breaks, and the value; None where it breaks none."""
    limits, m = limits_for(language, text), Measures(text)
    low = limits.min_units if min_units is None else min_units

    def broken() -> Iterator[tuple[str, bool, object]]:
        yield "too_short", len(m.units) < low, len(m.units)
        yield "too_long", len(m.units) > limits.max_units, len(m.units)
        if limits.word_length is not None:
            least, most = limits.word_length
            yield "word_length", not least <= m.word_length <= most, m.word_length
        yield "letters", m.lettered < limits.min_lettered, m.lettered
        yield "symbols", m.symbols > limits.max_symbols, m.symbols
        bullets = m.lines_that(_BULLET.match)
        yield "bullets", bullets > limits.max_bullets, bullets
        ellipses = m.lines_that(lambda line: line.endswith(("...", "…")))
        yield "ellipses", ellipses > limits.max_ellipses, ellipses
        if limits.min_stop_words:
            stop = len(limits.stop_words.intersection(m.units))
            yield "stop_words", stop < limits.min_stop_words, stop
        ended = m.lines_that(lambda line: line.endswith(_ENDS))
        yield "line_ends", ended < limits.min_ended, ended
        short = m.lines_that(lambda line: len(line) <= limits.short_line)
        yield "short_lines", short > limits.max_short, short
        breaks = (len(m.lines) - 1) / max(1, len(m.units))
        yield "line_breaks", breaks > limits.max_lines_per_unit, breaks
        yield "repeated_lines", m.repeated_lines > limits.max_repeated_lines, m.repeated_lines
        yield "placeholder", "lorem ipsum" in text.lower(), "lorem ipsum"
        if "repetition" not in skip:
            for rule, share, limit in m.repetition(limits):
                yield f"repetition ({rule})", share > limit, share

    for rule, is_broken, value in broken():
        if is_broken and rule not in skip:
            return rule, f"{value:.3f}" if isinstance(value, float) else str(value)
    return None
