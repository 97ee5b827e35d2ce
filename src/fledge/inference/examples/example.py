"""A question with its answer, and how records become such."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fledge.records.kinds import Conversation, Labelled, Message, Preference, Prompt, Rating, Record


@dataclass(frozen=True)
class Example:
    """A question and its answer. `quality`: higher is better; None where nobody has said."""

    question: str
    answer: str
    quality: float | None = None


def examples_of(records: Iterable[Record]) -> list[Example]:
    """Examples from records of any kind that has an answer; `quality` from a rating, or from `score` or `quality` in
    `meta`. Rows without an answer are left out."""
    found = []
    for record in records:
        pair = _pair(record)
        if pair and pair[0].strip() and pair[1].strip():
            found.append(Example(*pair, _quality(record)))
    return found


def _pair(record: Record) -> tuple[str, str] | None:
    match record:
        case Prompt(messages=messages, answer=answer):
            return _last(messages), answer
        case Rating(prompt=messages, answer=answer):
            return _last(messages), answer
        case Labelled(text=text, label=label):
            return text, label
        case Preference(prompt=messages, answers=answers):
            return _last(messages), min(answers, key=lambda answer: answer.rank).content
        case Conversation(messages=(*before, last)) if before and last.role == "assistant":
            return _last(before), last.content
    return None


def _last(messages: Sequence[Message]) -> str:
    return messages[-1].content if messages else ""


def _quality(record: Record) -> float | None:
    if isinstance(record, Rating):
        return record.score
    said = next((record.meta[key] for key in ("quality", "score") if key in record.meta), None)
    try:
        return float(said) if said is not None and math.isfinite(float(said)) else None
    except ValueError:
        return None
