"""PDF and EPUB made here byte by byte: their text in order, and why one cannot be read."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import pytest

from fledge.core.errors import FledgeError
from fledge.records.formats import load
from fledge.records.kinds import Document
from fledge.records.raw.files import RawRow, rows_of
from fledge.records.raw.rows import Limits


def pdf(*pages: str, title: str = "", encrypt: str = "") -> bytes:
    """A PDF of pages whose lines stand below each other, in Helvetica."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for page in pages:
        lines = "".join(f"({line}) Tj 0 -14 Td " for line in page.split("\n"))
        stream = f"BT /F1 12 Tf 72 720 Td {lines}ET"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        shown = f"/Resources << /Font << /F1 3 0 R >> >> /Contents {len(objects)} 0 R"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {shown} >>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    objects.append(f"<< /Title ({title}) >>")
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R {encrypt}>>"
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n{trailer}\nstartxref\n{len(out)}\n%%EOF"
    return out + end.encode()


CONTAINER = (
    '<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)
PACKAGE = (
    '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/">'
    "<metadata><dc:title>夜里的猫头鹰</dc:title><dc:creator>某人</dc:creator><dc:language>zh-CN</dc:language></metadata>"
    '<manifest><item id="b" href="second%20part.xhtml" media-type="application/xhtml+xml"/>'
    '<item id="a" href="text/first.xhtml" media-type="application/xhtml+xml"/>'
    '<item id="n" href="nav.xhtml" properties="nav" media-type="application/xhtml+xml"/>'
    '<item id="p" href="p.png" media-type="image/png"/></manifest>'
    '<spine><itemref idref="n"/><itemref idref="a"/><itemref idref="b"/><itemref idref="p"/></spine></package>'
)
CHAPTER = '<html xmlns="http://www.w3.org/1999/xhtml"><head><title>{0}</title></head><body><h1>{0}</h1><p>{1}</p></body></html>'


def epub(**changed: bytes | None) -> bytes:
    """An EPUB of two chapters; `changed` replaces members, or takes them out (None)."""
    members: dict[str, bytes | None] = {
        "META-INF/container.xml": CONTAINER.encode(),
        "OEBPS/book.opf": PACKAGE.encode(),
        "OEBPS/second part.xhtml": CHAPTER.format("第二章", "天亮了。").encode(),
        "OEBPS/text/first.xhtml": CHAPTER.format("第一章", "夜里有<em>猫头鹰</em>。").encode(),
        "OEBPS/nav.xhtml": CHAPTER.format("目录", "不是正文").encode(),
        **changed,
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return out.getvalue()


def only(file: Path, limits: Limits | None = None) -> RawRow:
    (row,) = rows_of(file, limits)
    return row


def test_the_pages_of_a_pdf_are_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.pdf"
    file.write_bytes(pdf("The owls are a spe-\ncial kind of birds.", "", "They hunt at night.", title="Owls"))
    (document,) = load(file, "documents")
    assert isinstance(document, Document)
    assert document.text == "The owls are a special kind of birds.\n\nThey hunt at night."
    assert document.meta == {"title": "Owls", "pages": "3", "file": "a.pdf"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%PDF-1.4\nnothing", "is not a valid PDF"),
        (b"hello", "is not a valid PDF"),
        (pdf(""), "holds no text (a scan?)"),
        (pdf(*["\n".join(["word " * 10] * 40)] * 25), "is longer than a row may be"),
    ],
)
def test_a_pdf_of_no_use_says_why(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.pdf").write_bytes(content)
    row = only(tmp_path / "a.pdf", Limits(row=40_000))
    assert row.error and row.error.said("en") == reason


def test_a_locked_pdf_says_so(tmp_path: Path) -> None:
    lock = (
        "/Encrypt << /Filter /Standard /V 1 /R 2 /O <" + "41" * 32 + "> /U <" + "42" * 32 + "> /P -4 >> /ID [<41><41>] "
    )
    (tmp_path / "a.pdf").write_bytes(pdf("secret", encrypt=lock))
    row = only(tmp_path / "a.pdf")
    assert row.error and row.error.said("en") == "is locked by a password"


def test_the_chapters_of_a_book_come_in_the_order_of_its_spine(tmp_path: Path) -> None:
    file = tmp_path / "a.epub"
    file.write_bytes(epub())
    (document,) = load(file, "documents")
    assert isinstance(document, Document)
    assert document.text == "第一章\n\n夜里有猫头鹰。\n\n第二章\n\n天亮了。" and document.language == "zh"
    assert document.meta == {"title": "夜里的猫头鹰", "author": "某人", "file": "a.epub"}


BOMB = b"<html><body><p>" + b"0" * 50_000_000 + b"</p></body></html>"
DRM = b'<encryption><EncryptedData><CipherReference URI="OEBPS/text/first.xhtml"/></EncryptedData></encryption>'
LAUGHS = (
    b'<!DOCTYPE l [<!ENTITY a "ha ha ha ha ha ha ha ha ha ha">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + i, b"&%c;" % (97 + i) * 30) for i in range(7))
    + b"]><package>&h;</package>"
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04 no", "is not a valid EPUB"),
        (epub()[:-300], "is not a valid EPUB"),
        (epub(**{"META-INF/container.xml": None}), "is not a valid EPUB"),
        (epub(**{"OEBPS/book.opf": b"<package"}), "is not a valid EPUB"),
        (epub(**{"OEBPS/book.opf": LAUGHS}), "is not a valid EPUB"),
        (epub(**{"OEBPS/text/first.xhtml": None}), "is not a valid EPUB"),
        (epub(**{"META-INF/encryption.xml": DRM}), "is encrypted"),
        (epub(**{"OEBPS/text/first.xhtml": BOMB}), "unpacks to more than a file may hold"),
    ],
)
def test_an_epub_of_no_use_says_why(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.epub").write_bytes(content)
    row = only(tmp_path / "a.epub", Limits(row=1_000_000))
    assert row.error and row.error.said("en") == reason


def test_fonts_that_are_obfuscated_are_no_hindrance(tmp_path: Path) -> None:
    fonts = b'<encryption><EncryptedData><CipherReference URI="OEBPS/a.otf"/></EncryptedData></encryption>'
    (tmp_path / "a.epub").write_bytes(epub(**{"META-INF/encryption.xml": fonts}))
    assert only(tmp_path / "a.epub").value


def test_a_book_may_be_packed_and_a_damaged_member_is_found(tmp_path: Path) -> None:
    content = bytearray(epub())
    at = content.index(b"OEBPS/text/first.xhtml") + 30
    content[at : at + 20] = bytes(20)
    (tmp_path / "a.epub").write_bytes(content)
    row = only(tmp_path / "a.epub")
    assert row.error and row.error.said("en") == "is not a valid EPUB"


def test_a_compression_that_nobody_here_knows_is_said(tmp_path: Path) -> None:
    content = bytearray(epub())
    at = -1
    while (at := content.find(b"PK\x01\x02", at + 1)) >= 0:
        content[at + 10 : at + 12] = (97).to_bytes(2, "little")  # WavPack, in every entry of the directory
    (tmp_path / "a.epub").write_bytes(content)
    row = only(tmp_path / "a.epub")
    assert row.error and row.error.said("en") == "is not a valid EPUB" and "compression" in row.found


def test_a_broken_book_is_an_error_when_it_is_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.epub").write_bytes(zlib.compress(b"no"))
    with pytest.raises(FledgeError, match="is not a valid EPUB"):
        list(load(tmp_path / "a.epub", "documents"))
