"""The rules of Gopher, C4 and FineWeb, a step each, with every threshold as an option.

A threshold is one number for all languages, or {language: number}; a language not named keeps ours, which for English
is the paper's and for Chinese that of docs/data.md. The steps judge documents and labelled texts; rows of other kinds
pass (dialogues have rules of their own: step `quality`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeAlias

from pydantic import Field, field_validator

from fledge.core.errors import did_you_mean
from fledge.data.chunk import Chunk
from fledge.data.measures import Measures, measures
from fledge.data.quality import (
    Judged,
    Limits,
    c4_clean,
    fineweb_quality,
    gopher_quality,
    gopher_repetition,
    limits_for,
    sentences,
    written,
)
from fledge.data.steps.base import Refused, Rejected, Step

Threshold: TypeAlias = float | dict[str, float] | None
Shares: TypeAlias = dict[int, float] | dict[str, dict[int, float]] | None
_LIMITS = frozenset(field.name for field in fields(Limits))


class Rules(Step):
    """A list of rules, the limits of which are the options of the same names."""

    rules: ClassVar[tuple[str, ...]] = ()

    skip: tuple[str, ...] = Field((), description="rules to leave out")

    @field_validator("skip")
    @classmethod
    def _rules_there_are(cls, skip: tuple[str, ...]) -> tuple[str, ...]:
        for rule in skip:
            if rule not in cls.rules:
                allowed = ", ".join(cls.rules)
                raise ValueError(
                    f'there is no rule "{rule}" (there are {allowed}) {did_you_mean(rule, cls.rules)}'.rstrip()
                )
        return skip

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        refused: Refused = {}
        if chunk.kind in ("documents", "labelled"):
            for row, (m, language) in enumerate(zip(measures(chunk), chunk.languages, strict=True)):
                if (verdict := self._verdict(m, language)) is not None:
                    refused[row] = verdict
        return chunk, refused

    def judged(self, m: Measures, limits: Limits) -> Judged:
        """Every rule, whether the text breaks it, and the value."""
        raise TypeError(f"{type(self).__name__} has no rules")

    def _verdict(self, m: Measures, language: str) -> Rejected | None:
        for rule, broken, value in self.judged(m, self.limits(language, m.text)):
            if broken and rule.split(" ")[0] not in self.skip and rule not in self.skip:
                return Rejected(rule, written(value))
        return None

    def limits(self, language: str, text: str) -> Limits:
        """Ours, with what the options say in place."""
        ours = limits_for(language, text)
        options = {
            name: of_language(getattr(self, name), language) for name in type(self).model_fields if name in _LIMITS
        }
        said = {name: value for name, value in options.items() if value is not None}
        return replace(ours, **said) if said else ours


def of_language(value: Any, language: str) -> Any:
    """What an option says of a language; None where it says nothing."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value.get(language)
    return value


class GopherRepetition(Rules, name="gopher_repetition"):
    """Refuses texts that repeat themselves: lines, paragraphs, the most frequent n-gram, n-grams that stood before
    (Rae et al., 2021, table A1)."""

    rules = ("duplicate_paragraphs", "duplicate_paragraph_characters", "duplicate_lines", "duplicate_line_characters",
             "top", "repeated")  # fmt: skip

    max_duplicate_lines: Threshold = Field(None, description="share of lines that stood before (0.3)")
    max_duplicate_line_characters: Threshold = Field(None, description="share of characters in them (0.2)")
    max_duplicate_paragraphs: Threshold = Field(None, description="share of paragraphs that stood before (0.3)")
    max_duplicate_paragraph_characters: Threshold = Field(None, description="share of characters in them (0.2)")
    top: Shares = Field(None, description="n: share of characters in the most frequent n-gram; or by language")
    repeated: Shares = Field(None, description="n: share of characters in n-grams that stood before; or by language")

    def judged(self, m: Measures, limits: Limits) -> Judged:
        return gopher_repetition(m, limits)


class GopherQuality(Rules, name="gopher_quality"):
    """Refuses texts too short or long, with odd words, too many symbols, bullets or ellipses, or no stop words
    (Rae et al., 2021, appendix A.1.1)."""

    rules = ("too_short", "too_long", "word_length", "letters", "symbols", "bullets", "ellipses", "stop_words")

    min_units: Threshold = Field(None, description="words, or characters where words are not spaced (50; zh 80)")
    max_units: Threshold = Field(None, description="the same (100,000; zh 500,000)")
    min_lettered: Threshold = Field(None, description="share of words with a letter (0.8)")
    marks_are_words: bool = Field(False, description="punctuation counts as words without a letter, as in datatrove")
    max_symbols: Threshold = Field(None, description="hash signs or ellipses per word (0.1; zh 0.05)")
    max_bullets: Threshold = Field(None, description="share of lines that begin with a bullet (0.9)")
    max_ellipses: Threshold = Field(None, description="share of lines that end in an ellipsis (0.3)")
    min_stop_words: Threshold = Field(None, description="different stop words (2; 0 where we have no list)")

    def judged(self, m: Measures, limits: Limits) -> Judged:
        return gopher_quality(m, limits)


class FineWebQuality(Rules, name="fineweb_quality"):
    """Refuses lists and other texts whose lines do not end, are short or stood before (Penedo et al., 2024,
    section 3.6)."""

    rules = ("line_ends", "short_lines", "repeated_lines", "line_breaks")

    min_ended: Threshold = Field(None, description="share of lines that end in punctuation (0.12)")
    short_line: Threshold = Field(None, description="a line of so many characters is short (30; zh 10)")
    max_short: Threshold = Field(None, description="share of short lines (0.67)")
    max_again: Threshold = Field(None, description="share of characters in lines that stood before (0.01; zh 0.07)")
    max_lines_per_unit: Threshold = Field(None, description="line breaks per word (0.3; zh 0.2)")

    def judged(self, m: Measures, limits: Limits) -> Judged:
        return fineweb_quality(m, limits)


class C4Quality(Rules, name="c4_quality"):
    """Takes out lines about JavaScript, cookies and policies, lines of fewer than three words, marks of citations;
    refuses texts with fewer than five sentences, a placeholder or a curly bracket (Raffel et al., 2020, section 2.2).
    Lines without a full stop stay, as in FineWeb (Penedo et al., 2024), unless `ended` is set."""

    rules = ("placeholder", "curly_bracket", "sentences")

    min_sentences: Threshold = Field(None, description="sentences in what is left (5)")
    min_line_units: Threshold = Field(None, description="words in a line, or unspaced characters (3)")
    ended: bool = Field(False, description="keep only lines that end in . ! ? 。！？ or a quotation mark")

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        if chunk.kind not in ("documents", "labelled"):
            return chunk, {}
        cleaned: list[str] = []
        refused: Refused = {}
        for row, (text, language) in enumerate(zip(chunk.texts, chunk.languages, strict=True)):
            limits = self.limits(language, text)
            clean = c4_clean(text, limits.min_line_units, self.ended)
            for rule, broken, value in self._broken(clean, limits):
                if broken and rule not in self.skip:
                    refused[row] = Rejected(rule, value)
                    break
            cleaned.append(text if row in refused else clean)  # a refused text is kept as it came
            counts["c4_quality/changed"] += cleaned[-1] != text
        return (chunk if cleaned == chunk.texts else chunk.with_column("text", cleaned)), refused

    def _broken(self, clean: str, limits: Limits) -> Iterator[tuple[str, bool, str]]:
        yield "curly_bracket", "{" in clean, "{"
        yield "placeholder", "lorem ipsum" in clean.lower(), "lorem ipsum"
        count = 0
        for line in clean.split("\n"):
            count += sentences(line)
            if count >= limits.min_sentences:
                break
        yield "sentences", count < limits.min_sentences, str(count)
