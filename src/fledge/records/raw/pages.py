"""Web pages: files of HTML, and WARC archives of them (ISO 28500), one document a page.

The text of such a document is still HTML, and `meta.format` says so ("html"): taking the main text out of it is a step
of the refinery, where it is measured, parallel, and keeps what it rejects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from fledge.core.errors import need
from fledge.records.raw.encodings import charset_of, decode
from fledge.records.raw.rows import Limits, RawRow, too_long
from fledge.records.rejects import Reason

HTML_TYPES = ("text/html", "application/xhtml+xml")
_MAGIC = (
    (b"%PDF", "application/pdf"), (b"\x89PNG", "image/png"), (b"GIF8", "image/gif"), (b"\xff\xd8\xff", "image/jpeg"),
    (b"PK\x03\x04", "application/zip"), (b"\x1f\x8b", "application/gzip"), (b"RIFF", "audio, video or image"),
    (b"\x00\x00\x00", "video"), (b"wOF", "font"), (b"MZ", "a program"), (b"\x7fELF", "a program"),
)  # fmt: skip
_LOOKS = re.compile(rb"<(?:!doctype\s+html|html|head|body|title|meta|div|p|table|h1)\b", re.IGNORECASE)
UNKNOWN_ENCODING = Reason("is in no known encoding")


def html(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
    """One document: the page as it is, its encoding put right."""
    content = stream.read(limits.row + 1)
    if len(content) > limits.row:
        yield too_long(name, len(content))
    elif other := _magic(content):
        yield RawRow(name, error=Reason("is not HTML"), found=other)
    elif content.strip():
        found = decode(content)
        meta = {"format": "html", "file": name, "content_type": "text/html"}
        yield RawRow(name, error=UNKNOWN_ENCODING) if found is None else _page(name, *found, meta)


def warc(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
    """A document for each response that is a page; text already extracted (`conversion` records, as in Common Crawl's
    WET files) is plain text. Other responses are set aside with their type or status; requests and metadata are no
    rows."""
    archive = need("warcio.archiveiterator", "data").ArchiveIterator
    failed = need("warcio.exceptions", "data").ArchiveLoadFailed
    peeked = stream.peek(5)[:5] if hasattr(stream, "peek") else b"WARC/"
    if not peeked.startswith(b"WARC/"):
        yield RawRow(name, error=Reason("is not a WARC file"), last=True)
        return
    try:
        for number, record in enumerate(archive(stream)):
            if record.rec_type in ("response", "conversion", "resource"):
                yield _warc_row(record, f"{name}[{number}]", limits)
    except failed as error:
        yield RawRow(name, error=Reason("is not valid WARC from here on"), found=str(error)[:200], last=True)


def _warc_row(record: Any, where: str, limits: Limits) -> RawRow:
    """The row of one WARC record."""
    headers, http = record.rec_headers, record.http_headers
    url = headers.get_header("WARC-Target-URI") or ""
    said = (http if record.rec_type == "response" and http else headers).get_header("Content-Type") or ""
    kind = said.partition(";")[0].strip().lower()
    status = http.get_statuscode() if record.rec_type == "response" and http else "200"
    if status != "200":
        return RawRow(where, error=Reason("has another HTTP status than 200"), raw=url, found=status)
    plain = record.rec_type == "conversion" and kind == "text/plain"
    if kind and kind not in HTML_TYPES and not plain:
        return RawRow(where, error=Reason("is not HTML"), raw=url, found=kind)
    promised = int(headers.get_header("Content-Length") or 0)
    if promised > 2 * limits.row:
        return RawRow(where, error=too_long(where, promised).error, raw=url, found=f"{promised} bytes")
    content = record.content_stream().read(limits.row + 1)
    if len(content) > limits.row:
        return RawRow(where, error=too_long(where, 0).error, raw=url, found=f"over {limits.row} bytes")
    if (other := _magic(content)) or (not kind and not _LOOKS.search(content[:4_096])):
        return RawRow(where, error=Reason("is not HTML"), raw=url, found=other or "no type")
    if not content.strip():
        return RawRow(where, error=Reason("is empty"), raw=url)
    if (found := decode(content, charset_of(said))) is None:
        return RawRow(where, error=UNKNOWN_ENCODING, raw=url, found=charset_of(said))
    meta = {"url": url, "date": headers.get_header("WARC-Date") or "", "content_type": kind}
    identity = (headers.get_header("WARC-Record-ID") or "").removeprefix("<urn:uuid:").removesuffix(">")
    return _page(where, *found, meta if plain else {"format": "html", **meta}, identity)


def _page(where: str, text: str, encoding: str, meta: dict[str, str], identity: str = "") -> RawRow:
    if encoding not in ("utf-8", "ascii"):
        meta["encoding"] = encoding
    return RawRow(where, {"text": text, "id": identity, "meta": meta})


def _magic(content: bytes) -> str:
    """The type that the first bytes of something that is no page give away, "" for a page."""
    return next((kind for magic, kind in _MAGIC if content.startswith(magic)), "")
