"""What every reader of raw files works with: rows that know where they stand, limits, and lines that stay bounded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, BinaryIO, TypeAlias

from fledge.records.rejects import Reason

SHOWN = 2_000
"""Characters kept of what cannot be read."""


@dataclass(frozen=True)
class Limits:
    """How much one row, one document and one packed file may hold, in bytes.

    What is beyond a limit is set aside as one row with the size that was found; it is never held in memory whole.
    """

    row: int = 32_000_000
    whole: int = 1_000_000_000  # a file that has to be read at once: an object of JSON, a book
    unpacked: int = 1_000_000_000_000  # of one packed file
    ratio: float = 250.0  # bytes unpacked for each byte packed, counted from `small` on
    small: int = 64_000_000


@dataclass(frozen=True)
class RawRow:
    """One row of a raw file: its value (an object, or a text), or the error that kept it from having one.

    `found` is what was measured, for the rejected rows; after a `last` row nothing more can be read of the file.
    """

    where: str
    value: Any = None
    error: Reason | None = None
    raw: str = ""
    found: str = ""
    last: bool = False

    @property
    def text(self) -> str:
        """The row as one string, for the rejected rows."""
        if self.raw or isinstance(self.value, str):
            return self.raw or str(self.value)
        return "" if self.value is None else json.dumps(self.value, ensure_ascii=False, default=str)


Reader: TypeAlias = Callable[[BinaryIO, str, Limits], Iterator[RawRow]]
"""(stream, the file's name, limits) → its rows."""

NOT_UTF8 = Reason("is not UTF-8")
TOO_LONG = Reason("is longer than a row may be")


def lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes, int]]:
    """(number, line without its end, its length in bytes), a byte order mark dropped.

    Of a line of more than `limit` bytes the beginning is given alone: its length is more than what is there.
    """
    for number in count(1):
        line = stream.readline(limit + 1)
        if not line:
            return
        if len(line) <= limit or line.endswith(b"\n"):
            kept = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
            yield number, kept, len(kept)
            continue
        length, line = len(line), line[:SHOWN]
        while piece := stream.readline(1 << 20):
            length += len(piece)
            if piece.endswith(b"\n"):
                break
        yield number, line, length


def decoded(line: bytes) -> tuple[str, Reason | None]:
    """(text, None) or (what can be shown of it, the error)."""
    try:
        return line.decode(), None
    except UnicodeDecodeError:
        return line[:SHOWN].decode("utf-8", "backslashreplace"), NOT_UTF8


def shown(line: bytes) -> str:
    """The beginning of a line, whatever its encoding."""
    return line[:SHOWN].decode("utf-8", "backslashreplace")


def too_long(where: str, length: int, start: str = "", last: bool = False) -> RawRow:
    """The row that stands for one beyond the limit."""
    return RawRow(where, error=TOO_LONG, raw=start[:SHOWN], found=f"{length} bytes", last=last)
