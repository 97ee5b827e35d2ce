"""Rules of quality for documents, and the limits each language sets them.

The rules are Gopher's (Rae et al., 2021, table A1 and appendix A.1.1), C4's (Raffel et al., 2020, section 2.2) and
FineWeb's (Penedo et al., 2024, section 3.6), with one difference: a length is counted in units (words, or characters of
a script without spaces), and Chinese marks end a line as well as Latin ones. The limits for English are the papers'.
Those for Chinese were found on Chinese text (benchmarks/chinese_thresholds.py; docs/data.md says how): n-grams are
about twice as long as English ones, a line is short from 10 characters down instead of 30, and as formal prose lives
on formulas, more may recur.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fledge.data.measures import Measures
from fledge.data.texts import HAN, UNSPACED, units

_HAN, _WIDE = re.compile(f"[{HAN}]"), re.compile(f"[{UNSPACED}]")
_CHINESE_STOP = frozenset("的一是了在有不为和以之其者于与而所及或")
_ENGLISH_STOP = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
_UNSPACED_LANGUAGES = frozenset(["ja", "th", "lo", "my", "km"])


@dataclass(frozen=True)
class Limits:
    """Thresholds of one kind of script. Shares are of 1."""

    min_units: int
    max_units: int
    word_length: tuple[float, float] | None  # mean characters of a word
    min_lettered: float  # share of units with a letter in them
    max_symbols: float  # '#' or '…' per unit
    max_bullets: float  # lines that begin with a bullet
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
    max_duplicate_lines: float = 0.3  # lines that stood before
    max_duplicate_line_characters: float = 0.2
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_characters: float = 0.2
    max_again: float = 0.01  # characters in lines that stood before, FineWeb's
    marks_are_words: bool = False  # in the share of units with a letter, as in datatrove
    min_line_units: int = 3  # C4
    min_sentences: int = 5


ENGLISH = Limits(
    50, 100_000, (3, 10), 0.8, 0.1, 0.9, 0.3, 2, _ENGLISH_STOP, 0.12, 30, 0.67, 0.3, 0.2,
    {2: 0.20, 3: 0.18, 4: 0.16}, {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
)  # fmt: skip
SPACED = Limits(
    50, 100_000, (2, 14), 0.8, 0.1, 0.9, 0.3, 0, frozenset(), 0.12, 30, 0.67, 0.3, 0.2, ENGLISH.top, ENGLISH.repeated
)
CHINESE = Limits(
    80, 500_000, None, 0.8, 0.05, 0.9, 0.3, 2, _CHINESE_STOP, 0.12, 10, 0.67, 0.2, 0.2,
    {4: 0.20, 6: 0.20, 8: 0.20}, {10: 0.50, 16: 0.40, 20: 0.35}, max_again=0.07,
)  # fmt: skip
UNSPACED_SCRIPT = replace(CHINESE, min_stop_words=0, stop_words=frozenset())


def limits_for(language: str, text: str) -> Limits:
    """The limits of a language; of an unnamed one, what the script says."""
    if language == "zh" or (not language and 4 * len(_HAN.findall(text)) > len(text)):
        return CHINESE
    if language in _UNSPACED_LANGUAGES:
        return UNSPACED_SCRIPT
    return ENGLISH if language == "en" else SPACED


Judged: TypeAlias = Iterator[tuple[str, bool, object]]
"""(rule, whether the text breaks it, the value that decides), the cheap ones first, each counted when asked for."""


def gopher_quality(m: Measures, limits: Limits) -> Judged:
    """Gopher's rules of quality: length, words, symbols, bullets, ellipses, stop words."""
    size = len(m.units)
    yield "too_short", size < limits.min_units, size
    yield "too_long", size > limits.max_units, size
    if limits.word_length is not None:
        least, most = limits.word_length
        yield "word_length", not least <= m.word_length <= most, m.word_length
    lettered = m.lettered_with_marks if limits.marks_are_words else m.lettered
    yield "letters", lettered < limits.min_lettered, lettered
    yield "symbols", m.symbols > limits.max_symbols, m.symbols
    yield "bullets", m.bullets > limits.max_bullets, m.bullets
    yield "ellipses", m.ellipses > limits.max_ellipses, m.ellipses
    if limits.min_stop_words:
        stop = m.stop_words(limits.stop_words)
        yield "stop_words", stop < limits.min_stop_words, stop


def gopher_repetition(m: Measures, limits: Limits) -> Judged:
    """Gopher's rules of repetition: paragraphs, lines, and n-grams by the characters they hold."""
    times, characters = m.duplicate_paragraphs
    yield "duplicate_paragraphs", times > limits.max_duplicate_paragraphs, times
    yield "duplicate_paragraph_characters", characters > limits.max_duplicate_paragraph_characters, characters
    times, characters = m.duplicate_lines
    yield "duplicate_lines", times > limits.max_duplicate_lines, times
    yield "duplicate_line_characters", characters > limits.max_duplicate_line_characters, characters
    yield from ngram_repetition(m, limits)


def ngram_repetition(m: Measures, limits: Limits) -> Judged:
    """The n-grams of Gopher's table A1."""
    for n, limit in limits.top.items():
        share = m.top(n)
        yield f"top {n}-gram", share > limit, share
    for n, share in m.repeated(tuple(limits.repeated)):
        yield f"repeated {n}-grams", share > limits.repeated[n], share


def fineweb_quality(m: Measures, limits: Limits) -> Judged:
    """What FineWeb added to C4: lines that end, lines that are short, lines that stood before, lists."""
    yield "line_ends", m.terminated < limits.min_ended, m.terminated
    short = m.short_lines(limits.short_line)
    yield "short_lines", short > limits.max_short, short
    again = m.duplicate_lines[1]
    yield "repeated_lines", again > limits.max_again, again
    yield "line_breaks", m.line_breaks > limits.max_lines_per_unit, m.line_breaks


RULES = (
    "too_short", "too_long", "word_length", "letters", "symbols", "bullets", "ellipses", "stop_words", "line_ends",
    "short_lines", "line_breaks", "repeated_lines", "repetition", "placeholder",
)  # fmt: skip


def broken_rule(
    text: str | Measures, language: str, skip: frozenset[str] = frozenset(), min_units: int | None = None
) -> tuple[str, str] | None:
    """The first rule of the bundle for documents that the text breaks, and the value; None where it breaks none.

    The bundle is what of all rules can be asked of any good document, a law or a manual as well as a page of the web:
    repeated lines with Gopher's limit instead of FineWeb's, brackets at the end of lines, and of C4 the placeholder.
    """
    m = text if isinstance(text, Measures) else Measures(text)
    limits = limits_for(language, m.text)
    low = limits.min_units if min_units is None else min_units
    for rule, is_broken, value in _bundle(m, limits, low, skip):
        if is_broken and rule not in skip:
            return rule, written(value)
    return None


def _bundle(m: Measures, limits: Limits, low: int, skip: frozenset[str]) -> Judged:
    yield "too_short", len(m.units) < low, len(m.units)
    for rule, broken, value in gopher_quality(m, limits):
        if rule != "too_short":
            yield rule, broken, value
    yield "line_ends", m.ended < limits.min_ended, m.ended
    for rule, broken, value in fineweb_quality(m, limits):
        if rule not in ("line_ends", "repeated_lines"):
            yield rule, broken, value
    yield "repeated_lines", m.repeated_lines > limits.max_repeated_lines, m.repeated_lines
    yield "placeholder", "lorem ipsum" in m.text.lower(), "lorem ipsum"
    if "repetition" not in skip:
        for rule, broken, value in ngram_repetition(m, limits):
            yield f"repetition ({rule})", broken, value


def written(value: object) -> str:
    """A rule's value as it stands beside a rejected row."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


# --- C4 -----------------------------------------------------------------------------------------------------------

_CITATION = re.compile(r"\[(?:\d+|edit|citation needed|编辑|来源请求)\]")
_LINE_END = tuple(".!?\"'”’。！？；：」』）》")
_SENTENCE = re.compile("[.!?][\"'”’)]*(?=\\s|$)|[。！？；]+[”’」』）]*")
POLICY = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
    "使用条款", "服务条款", "隐私政策", "隐私权政策", "版权所有", "保留所有权利", "icp备", "公网安备",
)  # fmt: skip


def sentences(text: str) -> int:
    """How many sentences a text has: those that end in a mark, and what stands behind the last of them."""
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return len(ends) + bool(text[ends[-1] if ends else 0 :].strip())


def c4_line(line: str, least_units: int, ended: bool) -> bool:
    """Whether C4 keeps a line: as long as `least_units`, no word over 1,000 characters, no word of JavaScript, policies
    or cookies; with `ended`, only if it ends like a sentence."""
    if ended and (not line.endswith(_LINE_END) or line.endswith("...")):
        return False
    low = line.lower()
    if "javascript" in low or any(phrase in low for phrase in POLICY):
        return False
    words = line.split()
    if len(line) > 1000 and any(len(word) > 1000 and not _WIDE.search(word) for word in words):
        return False
    return len(words) >= least_units or (not line.isascii() and len(units(line)) >= least_units)


def c4_clean(text: str, least_units: int, ended: bool) -> str:
    """The lines that C4 keeps, without the marks of citations."""
    lines = (_CITATION.sub("", line.strip()) if "[" in line else line.strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if not line or c4_line(line, least_units, ended)).strip()
