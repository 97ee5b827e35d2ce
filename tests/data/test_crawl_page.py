"""What a response is: sniffing, encodings, links, sitemaps, unpacking, and addresses that are not to be asked."""

from __future__ import annotations

import gzip
import socket
import time
import zlib
from typing import Any

import anyio
import httpcore
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fledge.core.addresses import RefusedAddress, UnknownHost, is_public, refuse_private
from fledge.data.crawl.fetch import CheckedBackend, FetchFailed, Unpacker, unpack
from fledge.data.crawl.page import HTML, OTHER, TEXT, XML, read_page, sniff
from fledge.data.crawl.sitemap import Entry, is_older, read_sitemap
from fledge.data.crawl.urls import canonical
from fledge.records.raw.encodings import decode

CHINESE = "人民法院审理案件，应当以事实为根据，以法律为准绳。对于一切公民，在适用法律上一律平等。" * 4
TRADITIONAL = "人民法院審理案件，應當以事實為根據，以法律為準繩。對於一切公民，在適用法律上一律平等。" * 4
RUSSIAN = "Все люди рождаются свободными и равными в своем достоинстве и правах. " * 4
FRENCH = "Tous les êtres humains naissent libres et égaux en dignité et en droits. " * 4
JAPANESE = "日本国民は、正当に選挙された国会における代表者を通じて行動し、" * 4


@pytest.mark.parametrize(
    ("text", "written", "declared"),
    [
        (CHINESE, "gbk", ""), (CHINESE, "gbk", "iso-8859-1"), (CHINESE, "gbk", "utf-8"), (CHINESE, "gb18030", "gb2312"),
        (CHINESE, "utf-8", "gb2312"), (CHINESE, "utf-8", "iso-8859-1"), (CHINESE, "utf-16", ""),
        (CHINESE, "utf-8-sig", "gbk"), (TRADITIONAL, "big5", "big5"), (TRADITIONAL, "big5", ""),
        (RUSSIAN, "cp1251", "iso-8859-1"), (RUSSIAN, "koi8-r", "koi8-r"), (FRENCH, "latin-1", "iso-8859-1"),
        (FRENCH, "latin-1", "utf-8"), (FRENCH, "latin-1", ""), (JAPANESE, "shift_jis", ""),
        (JAPANESE, "euc-jp", "euc-jp"), (JAPANESE, "iso2022_jp", "iso-2022-jp"), (FRENCH, "utf-8", "no-such-thing"),
        (FRENCH, "utf-8", "hex"),
    ],
)  # fmt: skip
def test_text_survives_what_its_header_claims(text: str, written: str, declared: str) -> None:
    source = f"<html><body><p class='some ascii around it'>{text}</p></body></html>"
    assert decode(source.encode(written), declared)[0] == source


def test_meta_is_believed_over_a_default_of_the_server_and_one_bad_byte_is_forgiven() -> None:
    short = '<meta charset="gbk"><p>短句子而已</p>'
    assert decode(short.encode("gbk"), "iso-8859-1") == (short, "gb18030")
    damaged = CHINESE.encode() + b"\xff" + CHINESE.encode()
    assert decode(damaged, "") == (f"{CHINESE}\ufffd{CHINESE}", "utf-8")
    assert decode(b"a\0b", "utf-8")[0] == "ab"


@pytest.mark.parametrize(
    ("start", "declared", "form"),
    [
        (b"<!DOCTYPE html><p>x", "application/octet-stream", HTML),
        (b"<!-- c --><html>", "image/png", HTML),
        (b"\xef\xbb\xbf  <HTML>", "text/plain", HTML),
        (b"\x89PNG\r\n\x1a\n", "text/html", OTHER),
        (b"%PDF-1.7", "text/html; charset=utf-8", OTHER),
        (b"PK\x03\x04", "text/plain", OTHER),
        (b"words \0 and nulls", "text/html", OTHER),
        (b"plain words", "text/html", HTML),
        (b"plain words", "text/plain; charset=x", TEXT),
        (b"plain words", "", TEXT),
        (b"body { color: red }", "text/css", OTHER),
        (b"<?xml version='1.0'?><urlset>", "text/xml", XML),
        (b"<?xml version='1.0'?><!DOCTYPE html><html>", "application/xhtml+xml", HTML),
        (b"\xff\xfe<\0h\0", "text/html", HTML),
    ],
)
def test_bytes_say_what_a_page_is(start: bytes, declared: str, form: str) -> None:
    assert sniff(start, declared)[0] == form


def test_links_in_their_order_with_their_marks() -> None:
    body = b"""<html><head><base href="/dir/"><link rel="alternate CANONICAL" href="../own?utm_source=x">
    <meta http-equiv="refresh" content="5; URL='later'"><meta name="me" content="nofollow"></head><body>
    <a href="b">b</a><a href=" a#x ">a</a><a href="a">again</a><a href="#top">t</a><a href="mailto:x@y.example">m</a>
    <a rel="nofollow ugc" href="paid">p</a><a rel=nofollow href=both>1</a><a href=both>2</a>
    <map><area href="//other.example/z"></map><a href="http://u:p@x.example/">cred</a></body></html>"""
    page = read_page("http://h.example/x/y", body, [("Content-Type", "text/html")], HTML, "me")
    assert page.canonical == "http://h.example/own"
    assert page.marks.nofollow and not page.marks.refused
    assert [link.url.removeprefix("http://h.example") for link in page.links] == [
        "/dir/later", "/dir/b", "/dir/a", "/dir/paid", "/dir/both", "http://other.example/z", "http://u:p@x.example/"
    ]  # fmt: skip
    refused = {link.url: link.refused for link in page.links if link.refused}
    assert refused == {
        "http://h.example/dir/paid": "rel=nofollow",
        "http://u:p@x.example/": "not the address of a page: it carries a user name",
    }


@example(b"\x00?\x80\x81", "")
@given(st.binary(max_size=300), st.sampled_from(["", "text/html; charset=gbk", "text/plain", "image/png", "charset"]))
def test_no_bytes_are_too_odd_to_be_read(noise: bytes, declared: str) -> None:
    sniff(noise, declared)
    read_sitemap("http://h/s.xml", noise)
    for body in (noise, b"<a href='" + noise + b"'>", b"<meta charset='" + noise + b"'>\xff" + noise):
        page = read_page("http://h/x", body, [("Content-Type", declared)], HTML, "me")
        page.text.encode()
        assert all(link.refused or canonical(link.url) == link.url for link in page.links)


@pytest.mark.parametrize(
    "body",
    [
        b"<!---->" * 5_000, b"<script" * 10_000 + b"\xff", b"<" * 70_000 + b"\xff", b"<div>" * 100_000,
        b"<span>" * 100_000 + b"<div></div>" * 100_000,
        b"<a href='" + b"a/" * 500_000 + b"'>", b"<meta " * 10_000, b"url = " * 10_000,
        b"<meta http-equiv=refresh content='" + b"url " * 200_000 + b"'>",
    ],
)  # fmt: skip
def test_hostile_pages_take_no_time(body: bytes) -> None:
    started = time.process_time()
    sniff(body[:2048], "text/html")
    read_page("http://h/x", body, [], HTML, "me")
    assert time.process_time() - started < 2


def test_a_long_page_that_is_not_deep_is_read_to_its_end() -> None:
    rows = "".join(f"<tr><td><p>{n}<br><a href=/{n}>x</a><li>y" for n in range(3_000))
    page = read_page("http://h/x", f"<table>{rows}".encode(), [], HTML, "me")
    assert len(page.links) == 3_000
    cut = read_page("http://h/x", (f"<a href=/1></a>{'<div>' * 2_000}<a href=/2></a>").encode(), [], HTML, "me")
    assert [link.url for link in cut.links] == ["http://h/1"] and cut.text.endswith("<a href=/2></a>")


SITEMAP = b"""<?xml version="1.0" encoding="UTF-8"?>
<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9" xmlns:i="http://www.google.com/schemas/sitemap-image/1.1">
<url><i:image><i:loc>http://h/picture</i:loc></i:image><loc> http://h/a?utm_source=s&amp;b=1 </loc>
<lastmod>2026-01-31T10:00:00Z</lastmod></url><url><loc>/b</loc></url><url><loc>/b</loc></url>
<url><loc>ftp://h/c</loc></url>"""


def test_sitemaps_are_read_as_far_as_they_are_sound() -> None:
    wanted = [Entry("http://h/a?b=1", "2026-01-31T10:00:00Z", False), Entry("http://h/b", "", False)]
    assert read_sitemap("http://h/s.xml", SITEMAP + b"</urlset>") == wanted
    assert read_sitemap("http://h/s.xml", SITEMAP + b"<url><loc>http://h/cut") == wanted
    index = b"<sitemapindex><sitemap><loc>http://h/1.xml.gz</loc></sitemap></sitemapindex>"
    assert read_sitemap("http://h/s.xml", index) == [Entry("http://h/1.xml.gz", "", True)]
    assert [e.url for e in read_sitemap("http://h/s.txt", b"\xef\xbb\xbfhttp://h/x\nhttp://h/y\nwords\n")] == [
        "http://h/x", "http://h/y"
    ]  # fmt: skip
    feed = b"<feed xmlns='http://www.w3.org/2005/Atom'><entry><link href='/p'/><updated>2026</updated></entry></feed>"
    assert read_sitemap("http://h/f", feed) == [Entry("http://h/p", "2026", False)]
    laughs = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><urlset><url><loc>/&b;</loc></url></urlset>'
    assert read_sitemap("http://h/f", laughs) == []


def test_dates_of_sitemaps() -> None:
    assert is_older("2026-01-31T10:00:00Z", "2026-02-01")
    assert not is_older("2026-02-01", "2026-02-01")
    assert is_older("2025", "2026-02-01") and not is_older("2026", "2026-02-01")
    assert not is_older("yesterday", "2026-02-01")


def test_unpacking_stops_at_its_limit() -> None:
    bomb = gzip.compress(b"0" * 50_000_000)
    unpacker = Unpacker("gzip", 100_000)
    unpacker.feed(bomb)
    assert unpacker.full and unpacker.size <= 100_001
    text = b"some text " * 1000
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    for coding, packed in {
        "": text, "gzip": gzip.compress(text[:5000]) + gzip.compress(text[5000:]), "deflate": zlib.compress(text),
        "Deflate": raw.compress(text) + raw.flush(),
    }.items():  # fmt: skip
        assert unpack(packed, coding, 1_000_000) == text
        slow = Unpacker(coding, 1_000_000)
        for byte in packed:
            slow.feed(bytes([byte]))
        assert slow.body() == text
    with pytest.raises(FetchFailed, match="cannot be unpacked"):
        unpack(b"\x1f\x8bno such thing", "gzip", 100)
    with pytest.raises(FetchFailed, match="not asked for"):
        unpack(b"x", "br", 100)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("240.0.0.1", False), ("255.255.255.255", False), ("192.0.2.1", False), ("::1", False), ("::", False),
        ("fe80::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("fec0::1", False), ("ff02::1", False),
        ("2001:db8::1", False), ("2606:4700::1111", True), ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False), ("64:ff9b::808:808", True), ("::127.0.0.1", False),
    ],
)  # fmt: skip
def test_addresses_inside_are_told_from_public_ones(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "127.1", "[::1]", "localhost", "localhost."])
def test_every_spelling_of_loopback_is_refused(host: str) -> None:
    with pytest.raises(RefusedAddress, match="not on the public internet"):
        refuse_private(host)
    assert refuse_private(host, allow=True)


def test_one_private_address_among_public_ones_refuses_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **rest: answers)
    with pytest.raises(RefusedAddress, match=r"10\.0\.0\.1"):
        refuse_private("two-faced.example")


def test_a_name_without_an_address_is_unknown() -> None:
    for host in ("a..b", "no-such-host.invalid"):
        with pytest.raises(UnknownHost, match="cannot be found"):
            refuse_private(host)


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers with a public address first and with loopback afterwards (DNS rebinding)."""
    asked: list[str] = []
    connected: list[str] = []

    def answer(host: str, *args: Any, **rest: Any) -> list[Any]:
        asked.append(host)
        ip = "8.8.8.8" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0))]

    class Inner(httpcore.AsyncNetworkBackend):
        async def connect_tcp(self, host: str, *args: Any, **rest: Any) -> Any:
            connected.append(host)
            raise httpcore.ConnectError("not in a test")

    async def connect() -> None:
        backend = CheckedBackend(allow_private=False)
        backend._inner = Inner()
        with pytest.raises(httpcore.ConnectError):
            await backend.connect_tcp("rebound.example", 80)
        with pytest.raises(RefusedAddress):
            await backend.connect_tcp("rebound.example", 80)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    anyio.run(connect)
    assert connected == ["8.8.8.8"]
