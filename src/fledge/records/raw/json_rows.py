"""JSON lines, and JSON as one array or one object, read as a stream of rows."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from fledge.records.raw.rows import NOT_UTF8, SHOWN, TOO_LONG, Limits, RawRow, decoded, lines, shown, too_long
from fledge.records.rejects import Reason

_LISTS = ("data", "rows", "examples", "items", "train")  # keys under which a JSON object may keep its rows
_PIECE = 1 << 20


def json_lines(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
    """A JSON value a line; blank lines do not count."""
    for number, line, length in lines(stream, limits.row):
        where = f"{name}:{number}"
        if length > len(line):
            yield too_long(where, length, shown(line))
        elif line.strip():
            text, error = decoded(line)
            yield RawRow(where, error=error, raw=text) if error else _parsed(text, where)


def json_file(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
    """An array of objects, an object that holds such an array, or (as many files have it) JSON lines.

    An array is read element by element; an object must fit into memory (`limits.whole`)."""
    start = b""
    while not start.strip() and (piece := stream.read(1 << 16)):
        start += piece.removeprefix(b"\xef\xbb\xbf")
    if start.lstrip().startswith(b"["):
        yield from _array(_Window(start, stream), name, limits)
        return
    content = start + stream.read(max(0, limits.whole + 1 - len(start)))
    if len(content) > limits.whole:
        yield RawRow(name, error=Reason("is too big for one object of JSON; JSON lines can be of any size"), last=True)
        return
    text, error = decoded(content)
    if error:
        yield RawRow(name, error=error, raw=text)
        return
    whole = _parsed(text, f"{name}:1")
    first_line = text.lstrip().partition("\n")[0]
    if whole.error and not _parsed(first_line, name).error:
        yield from json_lines(io.BytesIO(content), name, limits)
        return
    key = _list_in(whole.value)
    if key is None:
        yield whole
    else:
        yield from (RawRow(f"{name}: {key}[{i}]", value) for i, value in enumerate(whole.value[key]))


def _parsed(text: str, where: str) -> RawRow:
    try:
        return RawRow(where, json.loads(text), raw=text)
    except (ValueError, RecursionError) as error:
        return RawRow(where, error=Reason("is not valid JSON: {error}", error=_brief(error)), raw=text)


def _brief(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _list_in(value: Any) -> str | None:
    """The key under which an object keeps its rows."""
    return next((key for key in _LISTS if isinstance(value, dict) and isinstance(value.get(key), list)), None)


class _Window:
    """The part of a stream that is looked at: `text` from `at` on is not read yet, `line` counts from 1. Bytes that are
    not UTF-8 are lone surrogates in it, so that only their own element is set aside."""

    def __init__(self, start: bytes, stream: BinaryIO) -> None:
        self.stream, self.decoder = stream, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.line = self.decoder.decode(start), 0, 1
        self._counted = 0
        self.ended = False

    def more(self, size: int) -> bool:
        """Read on; False at the end."""
        data = self.stream.read(size)
        self.count()
        self.text = self.text[self.at :] + self.decoder.decode(data, final=not data)
        self.at = self._counted = 0
        self.ended = not data
        return bool(data)

    def count(self) -> int:
        """The line on which `at` stands."""
        self.line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self.line

    def skip(self, of: str) -> str:
        """Go to the next character that is not one of `of`, and return it; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in of:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more(_PIECE):
                return ""


def _array(window: _Window, name: str, limits: Limits) -> Iterator[RawRow]:
    """Element by element, so that each knows its line and one broken element does not cost those before it."""
    decoder, blank = json.JSONDecoder(), " \t\r\n"
    window.skip(blank)
    window.at += 1
    while True:
        try:
            if window.skip(blank + ",") == "]":
                return
            where = f"{name}:{window.count()}"
            value, end = _element(decoder, window, limits)
        except (ValueError, RecursionError) as error:
            rest = window.text[window.at : window.at + SHOWN]
            reason = Reason("is not valid JSON from here on: {error}", error=_brief(error))
            yield RawRow(where, error=reason, raw=rest, last=True)
            return
        if end < 0:
            yield RawRow(where, error=TOO_LONG, raw=window.text[:SHOWN], found=f"over {limits.row} bytes", last=True)
            return
        raw = window.text[window.at : end]
        yield RawRow(where, value, raw=raw) if _is_text(raw) else RawRow(where, error=NOT_UTF8, raw=raw[:SHOWN])
        window.at = end


def _is_text(raw: str) -> bool:
    try:
        return raw.isascii() or bool(raw.encode())
    except UnicodeEncodeError:
        return False


def _element(decoder: json.JSONDecoder, window: _Window, limits: Limits) -> tuple[Any, int]:
    """(value, where it ends) of the element at the window's place, or (None, -1) when it is longer than a row may be.
    Raises ValueError where there is none."""
    while True:
        failed: Exception | None = None
        try:
            value, end = decoder.raw_decode(window.text, window.at)
            if end < len(window.text) or window.ended:
                return value, end
        except (ValueError, RecursionError) as error:
            failed = error
        # A broken element looks like one that goes on: only the end of the file, or the limit, tells them apart.
        held = len(window.text) - window.at
        if failed and (window.ended or _is_broken(failed, window.text)):
            raise failed
        if held > limits.row:
            return None, -1
        window.more(max(_PIECE, held))


def _is_broken(error: Exception, text: str) -> bool:
    """Whether no further text could mend it: it fails well before the end, and not in an open string."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return error.pos < len(text) - 32 and not error.msg.startswith("Unterminated string")
