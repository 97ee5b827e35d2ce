"""Raw files as rows, whatever they are: text, JSON, tables, web pages and archives of them, books; bare or packed.

    for row in rows_of(Path("crawl.warc.gz")): ...

Every row knows where it stands (`data.jsonl:17`), and what cannot be read is a row too: one with an error. Memory is
bounded by `Limits`, whatever the file holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fledge.core.artifact import EVENTS, MANIFEST
from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.records.raw.arrow import BESIDE, arrow
from fledge.records.raw.books import epub, pdf
from fledge.records.raw.json_rows import json_file, json_lines
from fledge.records.raw.packed import BROKEN, PACKED, Bomb, Span, is_packed, open_packed, suffix_of
from fledge.records.raw.pages import html, warc
from fledge.records.raw.rows import NOT_UTF8, Limits, RawRow, Reader, decoded, lines, shown, too_long
from fledge.records.raw.tables import parquet, table
from fledge.records.rejects import REJECTED, Reason

__all__ = ["NOT_UTF8", "PIECE", "READERS", "Limits", "RawRow", "files_in", "is_data", "rows_of"]

PIECE = 8_000
"""A text file is cut at blank lines into documents of about this many characters."""


def is_data(file: Path) -> bool:
    """Whether the file's ending is one that can be read."""
    return suffix_of(file) in READERS


def files_in(path: Path) -> list[Path]:
    """The readable data files at `path` (itself, or all below it in order, hidden ones left out).

    Raises FledgeError where there is none, or where the one named is of no known kind.
    """
    if path.is_file() and is_data(path):
        return [path]
    below = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    found = [file for file in below if not _is_aside(path, file) and is_data(file)]
    if found:
        return found
    if path.is_dir():
        what = t("holds no data file")
    else:
        what = t("is not a data file") if path.exists() else t("does not exist")
    raise FledgeError(Problem(what, where=str(path), allowed=listing([*READERS, *PACKED], 30)))


def _is_aside(folder: Path, file: Path) -> bool:
    """Whether a file lies in the folder without being data of it: hidden, or said by a program about the data."""
    parts = file.relative_to(folder).parts
    if any(part.startswith(".") for part in parts) or file.name in BESIDE:
        return True
    if parts[0] == REJECTED and file.match("part-*.parquet"):
        return True
    return parts in ((MANIFEST,), (EVENTS,)) and (folder / MANIFEST).is_file()


def rows_of(file: Path, limits: Limits | None = None, span: Span | None = None) -> Iterator[RawRow]:
    """All rows of a file, or of a span of it (`packed.spans`), read as a stream.

    Where a packed file breaks off, or turns out to be a bomb, the rows before it are there and the last one says so.
    Raises FledgeError where the file cannot be opened.
    """
    limits = limits or Limits()
    try:
        stream = open_packed(file, limits, span)
    except OSError as error:
        raise FledgeError(Problem(t("the file cannot be read"), where=str(file), found=str(error))) from None
    with stream:
        try:
            yield from READERS[suffix_of(file)](stream, file.name, limits)
        except Bomb as bomb:
            reason = Reason("unpacks to more than a file may hold")
            yield RawRow(file.name, error=reason, found=str(bomb), last=True)
        except BROKEN as broken:
            if not is_packed(file):
                raise FledgeError(Problem(t("the file cannot be read"), where=str(file), found=str(broken))) from None
            reason = Reason("the file breaks off: what comes from here on cannot be unpacked")
            yield RawRow(file.name, error=reason, found=str(broken), last=True)


def text(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
    """Documents of about PIECE characters, cut at blank lines (or, where none comes, at any line after four times as
    many). A smaller file is one document."""
    piece: list[str] = []
    size, first = 0, 1
    broken: Exception | None = None
    numbered = lines(stream, limits.row)
    while True:
        try:
            number, line, length = next(numbered, (0, b"", 0))
        except (*BROKEN, Bomb) as error:
            number, broken = 0, error
        if not number:
            break
        content, unreadable = decoded(line)
        if length > len(line):
            yield too_long(f"{name}:{number}", length, shown(line))
            continue
        if unreadable:
            yield RawRow(f"{name}:{number}", error=unreadable, raw=content)
            continue
        if not piece:
            if not content.strip():
                continue
            first = number
        if (size >= PIECE and not content.strip()) or size >= 4 * PIECE:
            yield RawRow(f"{name}:{first}", "\n".join(piece).rstrip())
            piece, size, first = [], 0, number
            if not content.strip():
                continue
        piece.append(content)
        size += len(content) + 1
    if piece:
        yield RawRow(f"{name}:{first}", "\n".join(piece).rstrip())
    if broken:
        raise broken


READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": table(","),
    ".tsv": table("\t"),
    ".parquet": parquet,
    ".arrow": arrow,
    ".feather": arrow,
    ".txt": text,
    ".md": text,
    ".html": html,
    ".htm": html,
    ".xhtml": html,
    ".warc": warc,
    ".wet": warc,
    ".pdf": pdf,
    ".epub": epub,
}
"""File ending → its reader; each also packed (`.jsonl.gz`)."""
