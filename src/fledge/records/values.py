"""The values of raw rows, and what is said of one that is not what it should be."""

from __future__ import annotations

import json
import math
from typing import Any, TypeAlias

from fledge.records.rejects import Reason

Values: TypeAlias = dict[str, Any]
"""A row's values under its format's own names."""
Common: TypeAlias = dict[str, Any]
"""A record's id, language, source and meta."""


class Misfit(Exception):
    """A row is not of its file's format; the reason says which key and why."""

    def __init__(self, sentence: str, **values: object) -> None:
        super().__init__(sentence)
        self.reason = Reason(sentence, **values)


def text_at(key: str, value: Any, may_be_empty: bool = False) -> str:
    """The text itself. Raises Misfit where it is none, or blank."""
    if not isinstance(value, str):
        raise Misfit('"{key}" is {found} where a text is wanted', key=key, found=kind_name(value))
    if not may_be_empty and not value.strip():
        raise Misfit('"{key}" is empty', key=key)
    return value


def unpacked(value: Any, shape: type) -> Any:
    """A list or an object that stands as JSON in a text (the cell of a table); anything else as it is."""
    if isinstance(value, str) and value[:1] == ("[" if shape is list else "{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, shape) else value
    return value


def number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Misfit('"{key}" is {found} where a number is wanted', key=key, found=kind_name(value))
    return number


def as_text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def kind_name(value: Any) -> Reason:
    """What a JSON value is, for messages."""
    match value:
        case None:
            return Reason("nothing")
        case str():
            return Reason("a text")
        case bool() | int() | float():
            return Reason("a number")
        case list():
            return Reason("a list")
        case dict():
            return Reason("an object")
    return Reason("{type}", type=type(value).__name__)
