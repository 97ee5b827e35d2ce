"""Web pages and archives of them: what is a page, in which encoding, and what is set aside with its reason."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from fledge.core.errors import FledgeError
from fledge.records.formats import load
from fledge.records.kinds import Document
from fledge.records.raw.encodings import charset_of, decode
from fledge.records.raw.files import rows_of
from fledge.records.raw.markup import plain
from fledge.records.raw.rows import Limits
from fledge.records.rejects import Rejects, read_rejects

CHINESE = (
    "<html><head>{meta}<title>新闻</title></head><body><p>国家保护公民的合法权益，任何人不得侵犯。</p></body></html>"
)
ENGLISH = "<html><body><p>Café owls — “hunting” at night.</p></body></html>"


def archive(file: Path, *responses: tuple[str, str, bytes], kind: str = "response", status: str = "200 OK") -> Path:
    """A WARC file of (url, content type, body)."""
    with file.open("wb") as out:
        writer = WARCWriter(out, gzip=file.suffix == ".gz")
        writer.write_record(writer.create_warcinfo_record(file.name, {"software": "test"}))
        for url, content_type, body in responses:
            headers = StatusAndHeaders(status, [("Content-Type", content_type)], protocol="HTTP/1.1")
            http: dict[str, Any] = {"http_headers": headers} if kind == "response" else {}
            record = writer.create_warc_record(
                url, kind, payload=io.BytesIO(body), warc_content_type=content_type if kind != "response" else "",
                warc_headers_dict={"WARC-Date": "2026-01-02T03:04:05Z"}, **http,
            )  # fmt: skip
            writer.write_record(record)
            if kind == "response":
                writer.write_record(
                    writer.create_warc_record(
                        url, "request", payload=io.BytesIO(b""), http_headers=StatusAndHeaders("GET / HTTP/1.1", [])
                    )
                )
    return file


def collected(file: Path, folder: Path, limits: Limits | None = None) -> tuple[list[Document], list[dict[str, Any]]]:
    with Rejects(folder) as rejects:
        documents = list(load(file, "documents", rejects, limits))
    return documents, list(read_rejects(folder))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_page_of_an_archive_is_a_document_that_is_still_html(tmp_path: Path, name: str) -> None:
    page = CHINESE.format(meta="")
    file = archive(tmp_path / name, ("http://例子.cn/a?b=1", "text/html; charset=gb2312", page.encode("gb18030")))
    (document,), rejected = collected(file, tmp_path / "out")
    assert document.text == page and not rejected
    assert document.meta == {
        "format": "html", "url": "http://例子.cn/a?b=1", "date": "2026-01-02T03:04:05Z", "content_type": "text/html",
        "encoding": "gb18030",
    }  # fmt: skip
    assert len(document.id) == 36 and document.id.count("-") == 4, "the record's own id"


def test_what_is_no_page_is_set_aside_with_its_url(tmp_path: Path) -> None:
    file = archive(
        tmp_path / "a.warc.gz",
        ("http://x.org/logo.png", "image/png", b"\x89PNG..."),
        ("http://x.org/lie", "text/html", b"%PDF-1.7 ..."),
        ("http://x.org/none", "", b"body { color: red }"),
        ("http://x.org/nothing", "text/html", b" \n"),
        ("http://x.org/long", "text/html", b"<p>" + b"x" * 5_000),
        ("http://x.org/good", "application/xhtml+xml; charset=utf-8", ENGLISH.encode()),
        ("http://x.org/untyped", "", b"<!DOCTYPE html><p>hello</p>"),
    )
    documents, rejected = collected(file, tmp_path / "out", Limits(row=2_000))
    assert [d.meta["url"] for d in documents] == ["http://x.org/good", "http://x.org/untyped"]
    assert [(row["row"], row["reason"], row["value"]) for row in rejected] == [
        ("http://x.org/logo.png", "is not HTML", "image/png"),
        ("http://x.org/lie", "is not HTML", "application/pdf"),
        ("http://x.org/none", "is not HTML", "no type"),
        ("http://x.org/nothing", "is empty", ""),
        ("http://x.org/long", "is longer than a row may be", rejected[4]["value"]),
    ]
    missing = archive(tmp_path / "b.warc", ("http://x.org/", "text/html", b"<p>no</p>"), status="404 Not Found")
    with pytest.raises(FledgeError, match="another HTTP status"):
        list(load(missing, "documents"))


def test_extracted_text_of_an_archive_is_plain(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.warc.wet.gz", ("http://x.org/", "text/plain", "正文。".encode()), kind="conversion")
    (document,), _ = collected(file, tmp_path / "out")
    assert document.text == "正文。" and "format" not in document.meta and document.meta["url"] == "http://x.org/"


def test_a_compressed_body_is_unpacked_and_a_swelling_one_set_aside(tmp_path: Path) -> None:
    bodies = [gzip.compress(ENGLISH.encode()), gzip.compress(b"<p>" + b"0" * 30_000_000)]
    with (tmp_path / "a.warc").open("wb") as out:
        writer = WARCWriter(out, gzip=False)
        for body in bodies:
            coded = [("Content-Type", "text/html"), ("Content-Encoding", "gzip")]
            headers = StatusAndHeaders("200 OK", coded, protocol="HTTP/1.1")
            record = writer.create_warc_record("http://x/", "response", payload=io.BytesIO(body), http_headers=headers)
            writer.write_record(record)
    documents, rejected = collected(tmp_path / "a.warc", tmp_path / "out", Limits(row=1_000_000))
    assert [d.text for d in documents] == [ENGLISH]
    assert [(row["reason"], row["value"]) for row in rejected] == [
        ("is longer than a row may be", "over 1000000 bytes")
    ]


def test_an_archive_that_breaks_off_keeps_its_whole_records(tmp_path: Path) -> None:
    pages = [(f"http://x/{i}", "text/html", f"<p>{i} {'word ' * 300}</p>".encode()) for i in range(50)]
    whole = archive(tmp_path / "a.warc.gz", *pages).read_bytes()
    (tmp_path / "a.warc.gz").write_bytes(whole[: len(whole) // 2])
    documents, rejected = collected(tmp_path / "a.warc.gz", tmp_path / "out")
    assert 20 <= len(documents) <= 26 and all(d.text.endswith("</p>") for d in documents)
    assert len(rejected) == 1 and "breaks off" in rejected[0]["reason"]


def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "a.warc").write_text("hello")
    with pytest.raises(FledgeError, match="is not a WARC file"):
        list(load(tmp_path / "a.warc", "documents"))


def test_a_page_in_a_file_is_a_document(tmp_path: Path) -> None:
    for name, content in (
        ("a.html", ENGLISH.encode()),
        ("b.htm", CHINESE.format(meta='<meta charset="gbk">').encode("gbk")),
    ):
        (tmp_path / name).write_bytes(content)
    one, two = load(tmp_path, "documents")
    assert isinstance(one, Document) and isinstance(two, Document)
    assert one.text == ENGLISH and one.meta == {"format": "html", "file": "a.html", "content_type": "text/html"}
    assert "任何人不得侵犯" in two.text and two.meta["encoding"] == "gb18030"
    (tmp_path / "c.xhtml").write_bytes(b"\x89PNG\r\n")
    assert [row.error.said("en") for row in rows_of(tmp_path / "c.xhtml") if row.error] == ["is not HTML"]


META = '<meta http-equiv="Content-Type" content="text/html; charset={}">'


@pytest.mark.parametrize(
    ("written", "header", "inside", "found"),
    [
        ("utf-8", "", "", "utf-8"),
        ("utf-8", "iso-8859-1", "", "utf-8"),  # a server's default that is a lie
        ("utf-8", "gb2312", "gbk", "utf-8"),
        ("gb18030", "gb2312", "", "gb18030"),
        ("gb18030", "utf-8", "gb2312", "gb18030"),  # the header lies, the page does not
        ("gb18030", "", "GBK", "gb18030"),
        ("big5", "", "big5", "big5hkscs"),
        ("utf-16", "", "", "utf-16-le"),
        ("gb18030", "iso-8859-1", "gb2312", "gb18030"),  # a server's default under which any bytes pass
        ("gb18030", "iso-8859-1", "", "gb18030"),
        ("gb18030", "", "", "gb18030"),  # nobody says: guessed
    ],
)
def test_the_encoding_of_a_chinese_page(written: str, header: str, inside: str, found: str) -> None:
    page = CHINESE.format(meta=META.format(inside) if inside else "")
    if written == "big5":
        page = page.replace("国家保护公民的合法权益，任何人不得侵犯", "國家保護公民的合法權益，任何人不得侵犯").replace(
            "新闻", "新聞"
        )
    text, encoding = decode(page.encode(written), header) or ("", "")
    assert (text, encoding) == (page, found)


KOREAN = "모든 국민은 법 앞에 평등하다. 누구든지 성별, 종교 또는 사회적 신분에 의하여 차별을 받지 아니한다. " * 4
JAPANESE = "すべて国民は、法の下に平等であって、人種、信条、性別、社会的身分又は門地により、差別されない。" * 4
RUSSIAN = "Все равны перед законом и судом. Государство гарантирует равенство прав и свобод человека и гражданина. " * 4


@pytest.mark.parametrize(
    ("text", "written"), [(KOREAN, "cp949"), (JAPANESE, "cp932"), (JAPANESE, "euc_jp"), (RUSSIAN, "cp1251")]
)
def test_what_says_nothing_of_its_encoding_is_not_taken_for_chinese(text: str, written: str) -> None:
    assert decode(f"<p>{text}</p>".encode(written)) == (f"<p>{text}</p>", written)


def test_the_encoding_of_a_western_page() -> None:
    assert decode(ENGLISH.encode("cp1252"), "iso-8859-1") == (ENGLISH, "cp1252"), "as browsers read that name"
    assert decode(ENGLISH.encode("cp1252"), "utf-8") is not None
    assert decode("<p>привет, мир</p>".encode("koi8-r"), "koi8-r") == ("<p>привет, мир</p>", "koi8-r")
    assert decode("<p>日本</p>".encode("iso-2022-jp"), "iso-2022-jp") == ("<p>日本</p>", "iso2022_jp")
    assert decode(b"", "no-such-charset") == ("", "utf-8")
    assert charset_of('text/html; Charset="GB2312"') == "gb2312" and charset_of("text/html") == ""


def test_a_page_cut_in_the_middle_of_a_character_loses_that_one_alone() -> None:
    page = CHINESE.format(meta="") * 20
    cut = page.encode()[:-100] + "侵".encode()[:2]
    text, encoding = decode(cut, "utf-8") or ("", "")
    assert encoding == "utf-8" and text.count("�") == 1 and page.startswith(text.rstrip("�")) and len(text) > 1_500


def test_content_as_plain_text() -> None:
    html = (
        "<h1>Title</h1><p>One <b>bold</b>\n word.<br>Next line.</p><ul><li>a</li><li>b &amp; c</li></ul>"
        "<pre><code>def f():\n    return  1\n</code></pre><script>no()</script><p>中文<i>段落</i>。</p>"
    )
    assert plain(html) == (
        "Title\n\nOne bold word.\nNext line.\n\n- a\n- b & c\n\n```\ndef f():\n    return  1\n```\n\n中文段落。"
    )
    assert plain("") == "" and plain("<div>" * 20_000 + "deep").endswith("deep")
