"""Raw files as rows: JSON lines, JSON, CSV, TSV, Parquet, plain text and Markdown, bare or packed with gzip or zstd.

Every row knows where it stands (`data.jsonl:17`), and what cannot be read is a row too: one with an error.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.records.rejects import Reason

PIECE = 8_000
"""A text file is cut at blank lines into documents of about this many characters."""
_PACKED = (".gz", ".zst")
_LISTS = ("data", "rows", "examples", "items", "train")  # keys under which a JSON object may keep its rows
_SHOWN = 2_000  # characters kept of what cannot be read


@dataclass(frozen=True)
class RawRow:
    """One row of a raw file: its value (an object, or a text), or the error that kept it from having one."""

    where: str
    value: Any = None
    error: Reason | None = None
    raw: str = ""

    @property
    def text(self) -> str:
        """The row as one string, for the rejected rows."""
        if self.raw or isinstance(self.value, str):
            return self.raw or str(self.value)
        return json.dumps(self.value, ensure_ascii=False, default=str)


def files_in(path: Path) -> list[Path]:
    """The readable data files at `path` (itself, or all below it in order, hidden ones left out).

    Raises FledgeError where there is none, or where the one named is of no known kind.
    """
    if path.is_file() and _suffix(path) in READERS:
        return [path]
    below = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    hidden = [any(part.startswith(".") for part in file.relative_to(path).parts) for file in below]
    found = [file for file, skip in zip(below, hidden, strict=True) if not skip and _suffix(file) in READERS]
    if found:
        return found
    if path.is_dir():
        what = t("holds no data file")
    else:
        what = t("is not a data file") if path.exists() else t("does not exist")
    raise FledgeError(Problem(what, where=str(path), allowed=listing([*READERS, *_PACKED], 20)))


def rows_of(file: Path) -> Iterator[RawRow]:
    """All rows of a file, read as a stream."""
    try:
        with _open(file) as stream:
            yield from READERS[_suffix(file)](stream, file.name)
    except (OSError, EOFError) as error:  # a broken gzip file, a file that may not be read
        raise FledgeError(Problem(t("the file cannot be read"), where=str(file), found=str(error))) from None


def _suffix(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open(file: Path) -> BinaryIO:
    match file.suffix.lower():
        case ".gz":
            return gzip.open(file, "rb")  # type: ignore[return-value]
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(str(file), "zstd"))
    return file.open("rb")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends; a byte order mark is dropped."""
    for number, line in enumerate(stream, start=1):
        yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")


NOT_UTF8 = Reason("is not UTF-8")


def _decoded(line: bytes) -> tuple[str, Reason | None]:
    """(text, None) or (what can be shown of it, the error)."""
    try:
        return line.decode(), None
    except UnicodeDecodeError:
        return line[:_SHOWN].decode("utf-8", "backslashreplace"), NOT_UTF8


def _parsed(text: str, where: str) -> RawRow:
    try:
        return RawRow(where, json.loads(text), raw=text)
    except (ValueError, RecursionError) as error:
        return RawRow(where, error=Reason("is not valid JSON: {error}", error=_brief(error)), raw=text)


def _brief(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _json_lines(stream: BinaryIO, name: str) -> Iterator[RawRow]:
    for number, line in _lines(stream):
        if line.strip():
            text, error = _decoded(line)
            where = f"{name}:{number}"
            yield RawRow(where, error=error, raw=text) if error else _parsed(text, where)


def _json(stream: BinaryIO, name: str) -> Iterator[RawRow]:
    """An array of objects, an object that holds such an array, or (as many files have it) JSON lines."""
    content = stream.read()
    text, error = _decoded(content.removeprefix(b"\xef\xbb\xbf"))
    if error:
        yield RawRow(name, error=error, raw=text)
    elif text.lstrip().startswith("["):
        yield from _json_array(text, name)
    else:
        whole = _parsed(text, f"{name}:1")
        first_line = text.lstrip().partition("\n")[0]
        if whole.error and not _parsed(first_line, name).error:
            yield from _json_lines(io.BytesIO(content), name)
            return
        key = _list_in(whole.value)
        if key is None:
            yield whole
        else:
            yield from (RawRow(f"{name}: {key}[{i}]", value) for i, value in enumerate(whole.value[key]))


def _list_in(value: Any) -> str | None:
    """The key under which an object keeps its rows."""
    return next((key for key in _LISTS if isinstance(value, dict) and isinstance(value.get(key), list)), None)


def _json_array(text: str, name: str) -> Iterator[RawRow]:
    """Element by element, so that each knows its line and one broken element does not cost those before it."""
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    while True:
        while at < len(text) and (text[at].isspace() or text[at] == ","):
            at += 1
        line += text.count("\n", counted, at)
        counted = at
        if text[at : at + 1] == "]":
            return
        where = f"{name}:{line}"
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            reason = Reason("is not valid JSON from here on: {error}", error=_brief(error))
            yield RawRow(where, error=reason, raw=text[at : at + _SHOWN])
            return
        yield RawRow(where, value, raw=text[at:end])
        at = end


def _table(delimiter: str) -> Callable[[BinaryIO, str], Iterator[RawRow]]:
    def read(stream: BinaryIO, name: str) -> Iterator[RawRow]:
        csv.field_size_limit(2**31 - 1)
        # Bytes that are not UTF-8 come through as lone surrogates, so that only their own row is set aside.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter)
        header = [name.strip() for name in next(reader, [])]
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield RawRow(f"{name}:{line}", error=Reason("is not valid CSV: {error}", error=error))
                continue
            if cells is None:
                return
            if cells:
                yield _cells(f"{name}:{line}", header, cells, delimiter)

    return read


def _cells(where: str, header: list[str], cells: list[str], delimiter: str) -> RawRow:
    raw = delimiter.join(cells)
    if len(cells) != len(header):
        error = Reason("has {found} cells where the header has {wanted}", found=len(cells), wanted=len(header))
        return RawRow(where, error=error, raw=raw)
    return RawRow(where, dict(zip(header, cells, strict=True)), raw=raw)


def _parquet(stream: BinaryIO, name: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read())) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1_024):
                for row in batch.to_pylist():
                    yield RawRow(f"{name}[{number}]", row)
                    number += 1
    except pa.ArrowInvalid as error:
        yield RawRow(name, error=Reason("is not valid Parquet: {error}", error=error))


def _text(stream: BinaryIO, name: str) -> Iterator[RawRow]:
    """Documents of about PIECE characters, cut at blank lines (or, where none comes, at any line after four times as
    many). A smaller file is one document."""
    piece: list[str] = []
    size, first = 0, 1
    for number, line in _lines(stream):
        text, error = _decoded(line)
        if error:
            yield RawRow(f"{name}:{number}", error=error, raw=text)
            continue
        if not piece:
            if not text.strip():
                continue
            first = number
        if (size >= PIECE and not text.strip()) or size >= 4 * PIECE:
            yield RawRow(f"{name}:{first}", "\n".join(piece).rstrip())
            piece, size, first = [], 0, number
            if not text.strip():
                continue
        piece.append(text)
        size += len(text) + 1
    if piece:
        yield RawRow(f"{name}:{first}", "\n".join(piece).rstrip())


READERS: dict[str, Callable[[BinaryIO, str], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}
