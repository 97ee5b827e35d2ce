"""Quality: documents by the rules of web corpora, dialogues by rules of their own."""

from __future__ import annotations

import re
from collections import Counter

from pydantic import Field, field_validator

from fledge.core.errors import did_you_mean
from fledge.data.chunk import Chunk
from fledge.data.measures import measures
from fledge.data.quality import RULES, broken_rule
from fledge.data.steps.base import RecordStep, Refused, Rejected
from fledge.data.texts import letters, text_of
from fledge.records.kinds import Conversation, Message, Preference, Prompt, Rating, Record, texts

CHAT_RULES = ("empty_text", "no_answer", "repeated_turns", "letters", "one_character", "same_answers")
_RUN = re.compile(r"(\S)\1{59,}")


class Quality(RecordStep, name="quality"):
    """Documents: Gopher, C4 and FineWeb (`data.quality`). Conversations and the rest are short by nature: they are
    refused when a turn is empty, nobody answers, half the turns or more repeat another, or letters are rare."""

    min_units: int | None = Field(None, description="shortest document, in words or Chinese characters (en 50, zh 80)")
    skip: tuple[str, ...] = Field((), description="rules to leave out: " + ", ".join((*RULES, *CHAT_RULES)))

    @field_validator("skip")
    @classmethod
    def _known(cls, skip: tuple[str, ...]) -> tuple[str, ...]:
        for rule in skip:
            if rule not in (*RULES, *CHAT_RULES):
                raise ValueError(f'there is no rule "{rule}" {did_you_mean(rule, (*RULES, *CHAT_RULES))}'.rstrip())
        return skip

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        if chunk.kind != "documents":
            return super().__call__(chunk, counts)
        skip, rows = frozenset(self.skip), zip(measures(chunk), chunk.languages, strict=True)
        broken = [broken_rule(measured, language, skip, self.min_units) for measured, language in rows]
        return chunk, {row: Rejected(*verdict) for row, verdict in enumerate(broken) if verdict}

    def look(self, record: Record, counts: Counter[str]) -> Record | Rejected:
        for rule, value in _broken(record):
            if rule not in self.skip:
                return Rejected(rule, value)
        return record


def _broken(record: Record) -> list[tuple[str, str]]:
    """The rules that a record other than a document breaks, with the values."""
    turns: tuple[Message, ...] = ()
    if isinstance(record, (Conversation, Prompt)):
        turns = record.messages
    elif isinstance(record, (Preference, Rating)):
        turns = record.prompt
    broken: list[tuple[str, str]] = []
    called = any(turn.tool_calls for turn in turns)
    if not list(texts(record)) or (not called and any(not text.strip() for text in texts(record))):
        broken.append(("empty_text", ""))
    if isinstance(record, Conversation):
        if not any(turn.role == "assistant" for turn in turns):
            broken.append(("no_answer", str(len(turns))))
        different = len({turn.content.strip().casefold() for turn in turns}) / max(1, len(turns))
        if len(turns) >= 4 and different <= 0.5:
            broken.append(("repeated_turns", f"{different:.2f}"))
    if isinstance(record, Preference) and len({answer.content.strip() for answer in record.answers}) < 2:
        broken.append(("same_answers", str(len(record.answers))))
    text = text_of(record)
    share = letters(text) / max(1, len("".join(text.split())))
    if share < 0.4 and not isinstance(record, (Prompt, Rating)):  # sums and code are fair questions
        broken.append(("letters", f"{share:.2f}"))
    if run := _RUN.search(text):
        broken.append(("one_character", run[0][:20]))
    return broken
