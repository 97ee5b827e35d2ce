"""Sources that need more than their file's ending to be read: dumps, papers, feeds, forums, code.

Each module is a reader: a function of a file and a `Setting` that gives records and sets aside, counted, what it
cannot use. `reader_for` chooses it by the file's name and its first bytes; every other file goes to `records.formats`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from fledge.records.kinds import Record
from fledge.records.raw.packed import BROKEN, Bomb, Span, open_packed, suffix_of
from fledge.records.raw.rows import Limits
from fledge.records.rejects import Rejects

STEP = "collect"
"""The step's name among the rejected rows."""
_HEAD = 16_384
_PART_OF_DUMP = re.compile(r"\.xml-p\d+p\d+")  # pages-articles3.xml-p88445p200509


@dataclass(frozen=True)
class Setting:
    """What a reader is told beside the file: the source's folder (`root`), where the rejected go, limits, a folder for
    its own use that is empty and is taken away afterwards, and the span of the file where it is cut."""

    root: Path
    rejects: Rejects
    limits: Limits
    scratch: Path
    span: Span | None = None

    def reject(self, reason: str, value: str = "", row: str = "", where: str = "") -> None:
        """Set one row aside."""
        self.rejects.add(STEP, reason, value, row, where)


Reader: TypeAlias = Callable[[Path, Setting], Iterator[Record]]

READERS = {
    "code": "documents",
    "feed": "documents",
    "latex": "documents",
    "wikipedia": "documents",
    "stackexchange": "conversations",
    "threads": "conversations",
}
"""Name of a reader (the module `sources.NAME` and its function `read`) → the kind of record it gives."""


def reader(name: str) -> Reader:
    """The function of a reader."""
    return cast(Reader, importlib.import_module(f"{__name__}.{name}").read)


def reader_for(file: Path) -> str:
    """Which reader a file needs, by its name and its first bytes; "" where it needs none of these."""
    match suffix_of(file):
        case ".tex":
            return "latex"
        case ".rss" | ".atom":
            return "feed"
        case suffix if suffix == ".xml" or _PART_OF_DUMP.fullmatch(suffix):
            return _of_xml(_head(file))
        case ".jsonl" | ".ndjson":
            return "threads" if _is_thread(_head(file)) else ""
    return ""


def _of_xml(head: bytes) -> str:
    marks = (("wikipedia", b"<mediawiki"), ("stackexchange", b"<posts>"), ("feed", b"<rss"), ("feed", b"<feed"))
    return next((name for name, mark in (*marks, ("feed", b"<rdf:RDF")) if mark in head), "")


def _is_thread(head: bytes) -> bool:
    """Whether the first row is a post that names the one it answers: `id`, `parent_id` and its text."""
    keys = (b'"id"', b'"parent_id"')
    line = head.partition(b"\n")[0]
    return all(key in line for key in keys) and any(key in line for key in (b'"text"', b'"body"', b'"content"'))


def _head(file: Path) -> bytes:
    """The first bytes of what is in a file; none where it cannot be unpacked."""
    try:
        with open_packed(file, Limits()) as stream:
            return stream.read(_HEAD)
    except (*BROKEN, Bomb):
        return b""
