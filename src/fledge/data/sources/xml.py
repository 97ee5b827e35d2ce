"""XML dumps of any size as a stream of elements, with what ends the stream early counted as rejected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

from fledge.data.sources import Setting
from fledge.records.raw.packed import BROKEN, Bomb, open_packed


class _TooLong(Exception):
    pass


class _Watched:
    """A stream that gives up when one element does not end. `before` and `after` stand in for what a span lacks."""

    def __init__(self, stream: BinaryIO, limit: int, before: bytes, after: bytes) -> None:
        self.stream, self.limit, self.since = stream, limit, 0
        self.before, self.after = before, after

    def read(self, size: int = -1) -> bytes:
        data = self.before or self.stream.read(size)
        self.before = b""
        if not data:
            data, self.after = self.after, b""
        self.since += len(data)
        if self.since > self.limit:
            raise _TooLong(f"over {self.limit} bytes without an end")
        return data


def elements(
    file: Path, names: set[str], setting: Setting, outermost: str = ""
) -> Iterator[tuple[str, ElementTree.Element]]:
    """(name without its namespace, element) of each element called so, whole; the first one of the file with its
    attributes only, under the name "". An element is empty again when the next one comes. A span of the file begins
    and ends between two elements below the first, which is called `outermost`."""
    reason, value = "", ""
    begins, ends = setting.span or (0, file.stat().st_size)
    before = f"<{outermost}>".encode() if begins else b""
    after = f"</{outermost}>".encode() if ends < file.stat().st_size else b""
    try:
        with open_packed(file, setting.limits, setting.span) as stream:
            watched = _Watched(stream, 4 * setting.limits.row, before, after)
            events = ElementTree.iterparse(watched, events=("start", "end"))
            _, root = next(events)
            yield "", root
            for event, element in events:
                if event == "end" and (name := element.tag.rpartition("}")[2]) in names:
                    yield name, element
                    watched.since = 0
                    root.clear()
    except _TooLong as error:
        reason, value = "is longer than a row may be", str(error)
    except ElementTree.ParseError as error:
        reason, value = "is not valid XML from here on", str(error)
    except (*BROKEN, Bomb) as error:
        reason, value = "the file breaks off: what comes from here on cannot be unpacked", str(error)
    if reason:
        setting.reject(reason, value, where=file.name)
