"""Check: what every sample of a data set must be, whatever its quality: a contract that the rows keep or break."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from fledge.data.language import language_of
from fledge.data.steps.base import RecordStep, Rejected
from fledge.data.texts import text_of, units
from fledge.records.kinds import Conversation, Labelled, Message, Preference, Prompt, Rating, Record

Rule: TypeAlias = Literal["answer", "alternate", "ends_with_answer", "system", "no_system", "best", "source"]
"""answer: every answer has text, or calls a tool; a prompt has what it is checked with
alternate: user and assistant take turns and the user begins (system first, tools' turns left out)
ends_with_answer: the last turn is the assistant's
system, no_system: the conversation has a system prompt, or none
best: one answer is ranked above all others
source: the row says where it comes from"""


class Check(RecordStep, name="check"):
    """Refuses samples that break the data set's contract: language, label, length, content. No rule is on by itself."""

    languages: tuple[str, ...] = Field((), description="the languages allowed, as ISO 639-1 codes")
    labels: tuple[str, ...] = Field((), description="the labels allowed; rows of other kinds are not asked")
    min_length: int = Field(0, ge=0, description="shortest sample, all its texts together")
    max_length: int | None = Field(None, ge=1, description="longest sample, all its texts together")
    length_in: Literal["units", "characters"] = Field(
        "units", description="what lengths count: units are words, or single characters of Chinese"
    )
    rules: tuple[Rule, ...] = Field(
        (), description="content: answer, alternate, ends_with_answer, system, no_system, best, source"
    )
    must_match: str = Field("", description="a regular expression that some place of the text must match")
    must_not_match: str = Field("", description="a regular expression that no place of the text may match")

    @field_validator("must_match", "must_not_match")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is below min_length {self.min_length}")
        if {"system", "no_system"} <= set(self.rules):
            raise ValueError("rules system and no_system exclude each other")
        return self

    def look(self, record: Record, counts: Counter[str]) -> Record | Rejected:
        return self._of_row(record) or self._of_text(text_of(record), record.language) or record

    def _of_row(self, record: Record) -> Rejected | None:
        if self.labels and isinstance(record, Labelled) and record.label not in self.labels:
            return Rejected("label not allowed", record.label)
        for rule in self.rules:
            if (found := _BROKEN[rule](record)) is not None:
                return Rejected(_SAID[rule], found)
        return None

    def _of_text(self, text: str, declared: str) -> Rejected | None:
        if self.languages and (language := declared or language_of(text)) not in self.languages:
            return Rejected("language not allowed", language or "und")
        if self.min_length or self.max_length is not None:
            length = len(units(text)) if self.length_in == "units" else len(text)
            if length < self.min_length:
                return Rejected("too short", f"{length} < {self.min_length} {self.length_in}")
            if self.max_length is not None and length > self.max_length:
                return Rejected("too long", f"{length} > {self.max_length} {self.length_in}")
        if self.must_match and not re.search(self.must_match, text):
            return Rejected("required pattern missing", self.must_match)
        if self.must_not_match and (match := re.search(self.must_not_match, text)):
            return Rejected("forbidden pattern found", match[0][:80])
        return None


def _turns(record: Record) -> tuple[Message, ...]:
    if isinstance(record, (Conversation, Prompt)):
        return record.messages
    return record.prompt if isinstance(record, (Preference, Rating)) else ()


def _answer(record: Record) -> str | None:
    """The place of an answer that is not there."""
    match record:
        case Conversation():
            said = [m for m in record.messages if m.role == "assistant"]
            empty = [str(i) for i, m in enumerate(said) if not m.content.strip() and not m.tool_calls]
            return None if said and not empty else f"answer {empty[0] if empty else 'none'}"
        case Preference():
            return next((f"answer {i}" for i, a in enumerate(record.answers) if not a.content.strip()), None)
        case Rating() | Prompt():
            return None if record.answer.strip() else "answer"
    return None


def _alternate(record: Record) -> str | None:
    """The roles, where two of the same kind follow each other or the assistant begins."""
    turns = _turns(record)
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    spoken: list[str] = []
    called = False
    for turn in rest:  # a call, the tool's results and the answer to them are one turn of the assistant
        if turn.role != "tool" and not (called and turn.role == "assistant"):
            spoken.append(turn.role)
        called = turn.role == "tool" or bool(turn.tool_calls)
    wanted = ["user", "assistant"] * (len(spoken) // 2 + 1)
    return None if spoken == wanted[: len(spoken)] else " ".join(turn.role for turn in turns)[:80]


def _ends_with_answer(record: Record) -> str | None:
    if not isinstance(record, Conversation):
        return None
    last = record.messages[-1] if record.messages else None
    return None if last and last.role == "assistant" and last.content.strip() else (last.role if last else "nothing")


def _has_system(record: Record) -> bool:
    return any(m.role == "system" for m in _turns(record))


def _system(record: Record) -> str | None:
    return None if _has_system(record) or not _turns(record) else "none"


def _no_system(record: Record) -> str | None:
    return "system" if _has_system(record) else None


def _best(record: Record) -> str | None:
    if not isinstance(record, Preference):
        return None
    ranks = [answer.rank for answer in record.answers]
    return None if ranks.count(min(ranks)) == 1 else "ranks " + " ".join(map(str, ranks))


def _source(record: Record) -> str | None:
    return None if record.source.strip() else ""


_BROKEN = {
    "answer": _answer,
    "alternate": _alternate,
    "ends_with_answer": _ends_with_answer,
    "system": _system,
    "no_system": _no_system,
    "best": _best,
    "source": _source,
}
_SAID = {
    "answer": "answer missing",
    "alternate": "turns do not alternate",
    "ends_with_answer": "does not end with an answer",
    "system": "system prompt missing",
    "no_system": "has a system prompt",
    "best": "no single best answer",
    "source": "source missing",
}
