"""Files as streams of bytes: bare, or packed with gzip, zstd, bzip2 or xz; a whole file, or a span of a bare one.

A packed file may be a bomb: a megabyte that unpacks to gigabytes. The stream counts what goes in and what comes
out and raises `Bomb` past the limits; what was read before is kept by whoever reads.
"""

from __future__ import annotations

import io
import lzma
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from fledge.records.raw.rows import Limits

PACKED = (".gz", ".zst", ".bz2", ".xz")
Span: TypeAlias = tuple[int, int]
"""[first byte, behind the last byte) of a file."""

BROKEN = (EOFError, zlib.error, lzma.LZMAError, OSError)
"""What a damaged or truncated packed file raises while it is read."""
_BUFFER = 1 << 18


class Bomb(Exception):
    """A packed file holds more than the limits allow; the message says how much was found."""


def suffix_of(file: Path) -> str:
    """The ending that says what is inside: `.jsonl` of `data.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_packed(file: Path) -> bool:
    """Whether the file's ending names a packing."""
    return file.suffix.lower() in PACKED


def open_packed(file: Path, limits: Limits, span: Span | None = None) -> BinaryIO:
    """The content of a file as a buffered stream. `span` is for bare files and for whole streams of bzip2. Raises
    OSError where it cannot be opened, and while it is read one of `BROKEN`, or Bomb."""
    if not is_packed(file):
        bare = file.open("rb")
        return bare if span is None else io.BufferedReader(_Part(bare, span), _BUFFER)
    packed: Any = file.open("rb") if span is None else _Part(file.open("rb"), span)
    return io.BufferedReader(_Unpacked(_unpacker(file, packed), packed, limits), _BUFFER)


def _unpacker(file: Path, packed: BinaryIO) -> Any:
    match file.suffix.lower():
        case ".gz":
            import gzip

            return gzip.GzipFile(fileobj=packed)
        case ".bz2":
            import bz2

            return bz2.BZ2File(packed)
        case ".xz":
            return lzma.LZMAFile(packed)
    import pyarrow as pa

    return pa.CompressedInputStream(packed, "zstd")


class _Unpacked(io.RawIOBase):
    """What an unpacker gives, counted."""

    def __init__(self, inner: Any, packed: BinaryIO, limits: Limits) -> None:
        self.inner, self.packed, self.limits = inner, packed, limits
        self.out = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self.inner.read1(len(view))  # what is there: a file that breaks off gives all before the break
        view[: len(data)] = data
        self.out += len(data)
        if self.out > self.limits.unpacked:
            raise Bomb(f"more than {self.limits.unpacked} bytes unpacked")
        if self.out > self.limits.small:
            ratio = self.out / max(self.packed.tell(), 1)
            if ratio > self.limits.ratio:
                raise Bomb(f"{self.out} bytes unpacked so far, {ratio:.0f} for each byte of the file")
        return len(data)

    def close(self) -> None:
        self.inner.close()
        self.packed.close()
        super().close()


class _Part(io.RawIOBase):
    """A span of a bare file."""

    def __init__(self, bare: BinaryIO, span: Span) -> None:
        self.bare, (self.start, self.end) = bare, span
        self.at = bare.seek(self.start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.end - self.at)]
        size = cast(io.BufferedReader, self.bare).readinto(view)
        self.at += size
        return size

    def tell(self) -> int:
        return self.at - self.start

    def close(self) -> None:
        self.bare.close()
        super().close()


def spans(file: Path, size: int) -> list[Span]:
    """A bare file of lines cut into spans of about `size` bytes, each ending with a line."""
    total, start = file.stat().st_size, 0
    found: list[Span] = []
    with file.open("rb") as stream:
        while total - start > 2 * size:
            stream.seek(start + size)
            while (piece := stream.readline(1 << 20)) and not piece.endswith(b"\n"):
                pass
            found.append((start, stream.tell()))
            start = stream.tell()
    return [*found, (start, total)] if start < total or not found else found


def streams(file: Path, size: int) -> list[Span]:
    """A file of many bzip2 streams behind each other (MediaWiki's multistream dumps) cut into spans of about `size`
    bytes, each of whole streams. A file of one stream is one span."""
    total, start = file.stat().st_size, 0
    found: list[Span] = []
    with file.open("rb") as stream:
        while total - start > 2 * size and (at := _next_stream(stream, start + size)):
            found.append((start, at))
            start = at
    return [*found, (start, total)]


_STREAM = re.compile(rb"BZh[1-9]1AY&SY")  # a stream's head and the first block's, 80 bits: not there by chance


def _next_stream(file: BinaryIO, at: int) -> int:
    """Where the next stream of bzip2 begins, from `at` on; 0 where there is none."""
    file.seek(at)
    held = b""
    while piece := file.read(1 << 20):
        if match := _STREAM.search(held + piece):
            return at - len(held) + match.start()
        at += len(piece)
        held = (held + piece)[-9:]
    return 0
