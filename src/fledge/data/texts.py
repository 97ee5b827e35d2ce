"""What the refinery and the splitter look at in a text, in Chinese as in English.

A *unit* is a word of a spaced script or one character of an unspaced one (Han, kana, and so on): n-grams, lengths and
shares are counted in units, so that no rule depends on `split()`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from fledge.records.kinds import Conversation, Document, Labelled, Message, Preference, Prompt, Rating, Record, texts

HAN = "㐀-䶿一-鿿豈-﫿𠀀-𳎯〇"
KANA = "぀-ヿㇰ-ㇿ"
UNSPACED = HAN + KANA + "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # with Thai, Lao, Burmese and Khmer
UNIT = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_LETTERS = re.compile(r"[^\W\d_]+")
R = TypeVar("R", bound=Record)


def units(text: str) -> list[str]:
    """Words and unspaced characters, normalised (NFKC, case folded); punctuation and white space are left out."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return UNIT.findall(text.casefold())


def letters(text: str) -> int:
    """How many letters (characters of any alphabet, Han included) a text has."""
    return sum(map(len, _LETTERS.findall(text)))


def text_of(record: Record) -> str:
    """All texts of a record, one after another, with a line break between."""
    return "\n".join(texts(record))


def size_of(record: Record) -> int:
    """UTF-8 bytes of all texts of a record."""
    return sum(len(text.encode()) for text in texts(record))


def map_texts(record: R, change: Callable[[str], str], everywhere: bool = False) -> R:
    """The record with `change` applied to each text; the same object where nothing changed.

    With `everywhere` also to what is not text to read but may name a person: `meta`, names of speakers and
    annotators, labels, and the strings and numbers inside tool calls (which stay valid JSON).
    """
    aside = change if everywhere else _same

    def message(m: Message) -> Message:
        content = change(m.content)
        if m.name or m.tool_calls:
            return replace(m, content=content, name=aside(m.name), tool_calls=_json(m.tool_calls, aside))
        return m if content == m.content else replace(m, content=content)

    def messages(some: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(message(m) for m in some)

    new: dict[str, Any]
    match record:
        case Document():
            new = {"text": change(record.text)}
        case Labelled():
            new = {"text": change(record.text), "label": aside(record.label)}
        case Conversation():
            new = {"messages": messages(record.messages)}
        case Prompt():
            new = {"messages": messages(record.messages), "answer": change(record.answer)}
        case Rating():
            new = {"prompt": messages(record.prompt), "answer": change(record.answer)}
        case Preference():
            answers = tuple(replace(a, content=change(a.content), by=aside(a.by)) for a in record.answers)
            new = {"prompt": messages(record.prompt), "answers": answers}
    if everywhere and record.meta:
        new["meta"] = {key: aside(value) for key, value in record.meta.items()}
    changed = {key: value for key, value in new.items() if value != getattr(record, key)}
    return replace(record, **changed) if changed else record


def _same(text: str) -> str:
    return text


def _json(text: str, change: Callable[[str], str]) -> str:
    """Change the strings, and the numbers that `change` would change as strings, inside a JSON text."""
    if not text or change is _same:
        return text

    def inside(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {key: inside(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [inside(item, key) for item in value]
        if isinstance(value, str):
            return _json(value, change) if value[:1] in ("{", "[") else named(value, key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value if (new := named(str(value), key)) == str(value) else new
        return value

    def named(value: str, key: str) -> str:
        """The value changed by itself or else as what its key says that it is: {"password": "…"}."""
        if (new := change(value)) != value or not key or not value:
            return new
        prefix = f"{key}: "
        whole = change(prefix + value)
        return whole.removeprefix(prefix) if whole.startswith(prefix) else value

    try:
        before = json.loads(text)
    except json.JSONDecodeError:
        return change(text)
    after = inside(before)
    return text if after == before else json.dumps(after, ensure_ascii=False)
