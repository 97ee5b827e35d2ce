"""The first noun. A record is one row of data, of one of six kinds.

    Document      plain text
    Conversation  turns of system, user, assistant and tool
    Preference    ranked answers to one prompt (a pair is two of them)
    Rating        one answer and its score
    Labelled      a text and its label
    Prompt        something to be answered, with a verifiable answer where there is one

All of them carry `id` (a hash of the content where the source has none), `language` (ISO 639-1, "" where unknown),
`source` and `meta`. On disk they are rows of Parquet made of strings, numbers, structs and lists only, so that
`datasets` and polars read them as they are: `meta` is a list of {key, value}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from fledge.core.artifact import digest_of

if TYPE_CHECKING:
    import pyarrow as pa

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

_COMMON = ("id", "language", "source", "meta")


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` is OpenAI's list of calls as JSON, "" where there are none."""

    role: Role
    content: str
    name: str = ""
    tool_calls: str = ""
    tool_call_id: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The message as OpenAI's API and chat templates know it: empty keys left out, `tool_calls` as a list."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        message |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key))}
        if self.tool_calls:
            message["tool_calls"] = json.loads(self.tool_calls)
        return message


class _Row:
    """What all kinds share: a missing id becomes a hash of the content (16 hex digits)."""

    def __post_init__(self) -> None:
        row = cast("Record", self)
        if not row.id:
            content = {key: value for key, value in to_row(row).items() if key not in _COMMON}
            object.__setattr__(self, "id", digest_of(content)[:16])


@dataclass(frozen=True)
class Document(_Row):
    """Plain text."""

    text: str
    id: str = ""
    language: str = ""
    source: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Conversation(_Row):
    """Turns, oldest first."""

    messages: tuple[Message, ...]
    id: str = ""
    language: str = ""
    source: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Answer:
    """One of several answers to a prompt: rank 1 is the best, equal ranks are ties; `by` says who wrote it."""

    content: str
    rank: int
    by: str = ""


@dataclass(frozen=True)
class Preference(_Row):
    """Ranked answers to one prompt."""

    prompt: tuple[Message, ...]
    answers: tuple[Answer, ...]
    id: str = ""
    language: str = ""
    source: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)

    def pairs(self) -> Iterator[tuple[Answer, Answer]]:
        """Every (chosen, rejected) with chosen ranked above rejected, best first; ties make no pair."""
        ranked = sorted(self.answers, key=lambda answer: answer.rank)
        return ((a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :] if a.rank < b.rank)


@dataclass(frozen=True)
class Rating(_Row):
    """One answer and its score; higher is better."""

    prompt: tuple[Message, ...]
    answer: str
    score: float
    id: str = ""
    language: str = ""
    source: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Labelled(_Row):
    """A text and its class."""

    text: str
    label: str
    id: str = ""
    language: str = ""
    source: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Prompt(_Row):
    """Something to be answered; `answer` is what a checker compares with, "" where there is none."""

    messages: tuple[Message, ...]
    answer: str = ""
    id: str = ""
    language: str = ""
    source: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


Record: TypeAlias = Document | Conversation | Preference | Rating | Labelled | Prompt

KINDS: dict[str, type[Record]] = {
    "documents": Document,
    "conversations": Conversation,
    "preferences": Preference,
    "ratings": Rating,
    "labelled": Labelled,
    "prompts": Prompt,
}
"""Artifact kind → the class of its rows."""


def kind_of(record: Record) -> str:
    """The artifact kind that holds such records: `Document(...)` → "documents"."""
    return next(kind for kind, cls in KINDS.items() if cls is type(record))


def as_document(conversation: Conversation) -> Document:
    """The conversation as plain text: the turns' contents, one after another, with a line break between.

    No names of speakers are written: it is text to pre-train on, and the tokens of a chat template come later.
    """
    text = "\n".join(message.content for message in conversation.messages if message.content)
    return Document(text, conversation.id, conversation.language, conversation.source, conversation.meta)


def texts(record: Record) -> Iterator[str]:
    """Every text that a person or a model wrote in the record, in order: what filters and counters look at."""
    match record:
        case Document() | Labelled():
            yield record.text
        case Conversation() | Prompt():
            yield from (message.content for message in record.messages)
        case Preference():
            yield from (message.content for message in record.prompt)
            yield from (answer.content for answer in record.answers)
        case Rating():
            yield from (message.content for message in record.prompt)
            yield record.answer


def to_row(record: Record) -> dict[str, Any]:
    """The record as a row of plain Python values that `schema(kind)` describes."""
    return {item.name: _plain(getattr(record, item.name)) for item in fields(record)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [{"key": key, "value": value[key]} for key in sorted(value)]
    if isinstance(value, tuple):
        return [vars(item) for item in value]
    return value


def from_row(kind: str, row: Mapping[str, Any]) -> Record:
    """The inverse of `to_row`. Columns the kind does not have are left aside; a missing one takes its default."""
    cls = KINDS[kind]
    values = {item.name: row[item.name] for item in fields(cls) if row.get(item.name) is not None}
    for name, part in (("messages", Message), ("prompt", Message), ("answers", Answer)):
        if name in values:
            values[name] = tuple(part(**item) for item in values[name])
    if "meta" in values:
        values["meta"] = {item["key"]: item["value"] for item in values["meta"]}
    return cls(**values)


def schema(kind: str) -> pa.Schema:
    """The Arrow schema of a kind's shards; its metadata names the kind (`fledge.kind`)."""
    import pyarrow as pa

    message = pa.struct([(item.name, pa.string()) for item in fields(Message)])
    answer = pa.struct([("content", pa.string()), ("rank", pa.int64()), ("by", pa.string())])
    pair = pa.struct([("key", pa.string()), ("value", pa.string())])
    special = {
        "messages": pa.list_(message), "prompt": pa.list_(message), "answers": pa.list_(answer),
        "score": pa.float64(), "meta": pa.list_(pair),
    }  # fmt: skip
    columns = [(item.name, special.get(item.name, pa.string())) for item in fields(KINDS[kind])]
    return pa.schema(columns, metadata={"fledge.kind": kind})
