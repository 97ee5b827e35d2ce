"""Books: PDF (through PDFium) and EPUB (a zip of XHTML), one document a file."""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import unquote
from xml.etree import ElementTree

from fledge.core.errors import need
from fledge.records.raw.encodings import decode
from fledge.records.raw.markup import plain
from fledge.records.raw.rows import Limits, RawRow, too_long
from fledge.records.rejects import Reason

_HYPHEN = re.compile(r"[\x02\u00ad\ufffe]\n?|(?<=[a-z])-\n(?=[a-z])")  # a word divided at the end of a line
_CONTAINER = "META-INF/container.xml"
_DRM = "META-INF/encryption.xml"


def pdf(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
    """The text of all pages, a blank line between two. A scan without text is set aside."""
    pypdfium2 = need("pypdfium2", "data")
    content = stream.read(limits.whole + 1)
    if len(content) > limits.whole:
        yield too_long(name, len(content), last=True)
        return
    try:
        book = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).lower()
        reason = Reason("is locked by a password") if locked else Reason("is not a valid PDF")
        yield RawRow(name, error=reason, found=str(error), last=True)
        return
    try:
        title = (book.get_metadata_dict(skip_empty=True) or {}).get("Title", "")
        pages, size = [], 0
        for page in pages_of(book):
            size += len(page)
            if size > limits.row:
                yield too_long(name, size, last=True)
                return
            pages.append(page)
    except pypdfium2.PdfiumError as error:
        yield RawRow(name, error=Reason("is not a valid PDF"), found=str(error), last=True)
        return
    finally:
        book.close()
    text = "\n\n".join(page for page in pages if page)
    if text:
        yield RawRow(name, {"text": text, "meta": {"title": title, "pages": len(pages), "file": name}})
    else:
        yield RawRow(name, error=Reason("holds no text (a scan?)"), found=f"{len(pages)} pages", last=True)


def pages_of(book: Any) -> Iterator[str]:
    """The text of each page of a PDF that PDFium has open, words divided at the end of a line put together."""
    for number in range(len(book)):
        page = book[number].get_textpage().get_text_bounded().replace("\r\n", "\n")
        yield _HYPHEN.sub("", page).strip()


def epub(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
    """The chapters in the order of the spine, a blank line between two."""
    content = stream.read(limits.whole + 1)
    if len(content) > limits.whole:
        yield too_long(name, len(content), last=True)
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield _book(_Zip(archive, limits), name)
    except _TooBig as error:
        yield RawRow(name, error=Reason("unpacks to more than a file may hold"), found=str(error), last=True)
    except (zipfile.BadZipFile, ElementTree.ParseError, KeyError, EOFError, RuntimeError, OSError, ValueError) as error:
        # RuntimeError: zipfile's word for a password, and for a compression that it does not know
        yield RawRow(name, error=Reason("is not a valid EPUB"), found=str(error)[:200], last=True)


class _TooBig(Exception):
    pass


class _Zip:
    """The members of a zip file, never more of them together than the limits of a row allow."""

    def __init__(self, archive: zipfile.ZipFile, limits: Limits) -> None:
        self.archive, self.left, self.limit = archive, limits.row, limits.row
        self.names = set(archive.namelist())

    def read(self, name: str) -> bytes:
        with self.archive.open(name) as member:
            content = member.read(self.left + 1)  # what the directory says of its size may be a lie
        if len(content) > self.left:
            raise _TooBig(f"over {self.limit} bytes")
        self.left -= len(content)
        return content


def _book(archive: _Zip, name: str) -> RawRow:
    """Raises KeyError where a part is missing, ParseError and ValueError where one cannot be read."""
    if _DRM in archive.names and b"EncryptedData" in archive.read(_DRM) and not _fonts_only(archive.read(_DRM)):
        return RawRow(name, error=Reason("is encrypted"), last=True)
    container = ElementTree.fromstring(archive.read(_CONTAINER))
    at = next((item.get("full-path") for item in container.iter() if _tag(item) == "rootfile"), None) or ""
    package = ElementTree.fromstring(archive.read(at))
    manifest = {item.get("id"): item for item in package.iter() if _tag(item) == "item"}
    spine = [manifest.get(item.get("idref")) for item in package.iter() if _tag(item) == "itemref"]
    chapters = []
    for item in spine:
        if item is None or item.get("properties") == "nav" or "html" not in (item.get("media-type") or ""):
            continue
        found = decode(archive.read(posixpath.normpath(posixpath.join(posixpath.dirname(at), _href(item)))))
        chapters.append(plain(found[0]) if found else "")
    text = "\n\n".join(chapter for chapter in chapters if chapter)
    if not text:
        return RawRow(name, error=Reason("holds no text"), found=f"{len(chapters)} chapters", last=True)
    said = {_tag(item): (item.text or "").strip() for item in reversed([*package.iter()]) if item.text}
    meta: dict[str, Any] = {"title": said.get("title", ""), "author": said.get("creator", ""), "file": name}
    return RawRow(name, {"text": text, "language": said.get("language", "")[:2].lower(), "meta": meta})


def _fonts_only(encryption: bytes) -> bool:
    """Whether nothing but fonts is obfuscated, which is no hindrance."""
    found = re.findall(rb"""URI\s*=\s*["']([^"']+)""", encryption)
    return all(uri.lower().endswith((b".ttf", b".otf", b".woff", b".woff2")) for uri in found)


def _href(item: ElementTree.Element) -> str:
    return unquote((item.get("href") or "").partition("#")[0])


def _tag(item: ElementTree.Element) -> str:
    return item.tag.rpartition("}")[2] if isinstance(item.tag, str) else ""
