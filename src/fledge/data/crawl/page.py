"""What a response is, and what a page says of itself: its type, text, links, canonical URL and marks for robots."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fledge.data.crawl.robots import Marks, marks_of
from fledge.data.crawl.urls import BadURL, NotHTTP, canonical
from fledge.records.raw.encodings import decode, text_in
from fledge.records.raw.markup import parse

if TYPE_CHECKING:
    from selectolax.lexbor import LexborHTMLParser

MOST_LINKS = 5_000
MOST_HREF = 8_000
NOFOLLOW = "rel=nofollow"
HTML, TEXT, XML, OTHER = "html", "text", "xml", "other"

_BINARY = {
    b"%PDF-": "application/pdf", b"\x89PNG\r\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif",
    b"PK\x03\x04": "application/zip", b"\x1f\x8b": "application/gzip", b"7z\xbc\xaf": "application/x-7z-compressed",
    b"Rar!": "application/vnd.rar", b"\x7fELF": "application/x-executable", b"MZ\x90": "application/x-msdownload",
    b"OggS": "audio/ogg", b"ID3": "audio/mpeg", b"RIFF": "audio/wav", b"wOFF": "font/woff", b"wOF2": "font/woff2",
    b"BZh": "application/x-bzip2", b"\xfd7zXZ": "application/x-xz", b"\x28\xb5\x2f\xfd": "application/zstd",
    b"\xd0\xcf\x11\xe0": "application/msword", b"SQLite format 3": "application/vnd.sqlite3",
}  # fmt: skip
_TAGS = re.compile(
    rb"(?>\s*(?:<!--.*?-->\s*|<\?xml[^>]*\?>\s*)*)<(?:!doctype\s+html|html|head|body|title|meta|script|style|table"
    rb"|div|h1|p|a|br|iframe|link|font)\b",
    re.IGNORECASE | re.DOTALL,
)
_XML_START = re.compile(rb"\s*(?:<\?xml\b|<(?:urlset|sitemapindex|rss|feed)\b)", re.IGNORECASE)
_NAMES = re.compile(  # names of what is no page, by the last part of the path
    r"\.(?:jpe?g|png|gif|webp|avif|svg|ico|bmp|tiff?|mp[34]|m4[av]|avi|mov|mkv|webm|flv|wmv|wav|ogg|flac|aac|css|js|mjs"
    r"|json|woff2?|ttf|otf|eot|zip|gz|tgz|bz2|xz|zst|7z|rar|tar|iso|dmg|exe|msi|apk|deb|rpm|jar|bin|whl|pdf|docx?|xlsx?"
    r"|pptx?|odt|ods|odp|epub|mobi|psd|swf|torrent)$",
    re.IGNORECASE,
)


def named_otherwise(url: str) -> str:
    """`.zip` of a URL that names no page; empty for what may be one."""
    match = _NAMES.search(url.partition("?")[0])
    return match[0].lower() if match else ""


def header(headers: Sequence[tuple[str, str]], name: str) -> str:
    """The first value of a header; empty where it is missing."""
    return next((value for key, value in headers if key.lower() == name), "")


def sniff(start: bytes, declared: str) -> tuple[str, str]:
    """What a body is from its first bytes: (html | text | xml | other, the media type found).

    `declared` is the header's `Content-Type`. It decides only where the bytes leave it open: pictures served as
    `text/html` are found out, and so are pages served as `application/octet-stream`.
    """
    declared = declared.partition(";")[0].strip().lower()
    for magic, found in _BINARY.items():
        if start.startswith(magic):
            return OTHER, found
    bare = start.removeprefix(b"\xef\xbb\xbf")
    wide = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    if not wide and b"\0" in start:
        return OTHER, declared if not declared.startswith("text/") else "application/octet-stream"
    if _TAGS.match(bare):
        return HTML, "text/html"
    if _XML_START.match(bare) and declared not in ("text/html", "application/xhtml+xml"):
        return XML, "application/xml"
    if declared in ("text/html", "application/xhtml+xml") or (wide and not declared):
        return HTML, declared or "text/html"
    if declared in ("text/plain", "text/markdown", "text/x-markdown", ""):
        return TEXT, declared or "text/plain"
    return OTHER, declared


@dataclass(frozen=True)
class Link:
    """A link as it stands in a page, in its order: the canonical URL, and why it is not to be followed, if so."""

    url: str
    refused: str = ""


@dataclass(frozen=True)
class Page:
    """A page's text and what it says of itself."""

    text: str
    encoding: str
    format: str  # html or text
    links: list[Link] = field(default_factory=list)
    canonical: str = ""  # of <link rel="canonical">, where it is another page's
    marks: Marks = field(default_factory=Marks)


def read_page(
    url: str, body: bytes, headers: Sequence[tuple[str, str]], kind: str, token: str, sort_query: bool = False
) -> Page:
    """The page at `url` from its bytes. `kind` is what `sniff` said, `token` the crawler's name for robots."""
    found = decode(body, _charset(header(headers, "content-type")))
    text, encoding = found or (text_in(body, "cp1252"), "cp1252")  # what the web takes a page for that is in none
    if kind != HTML:
        return Page(text, encoding, TEXT, marks=marks_of((), headers, token))
    tree = parse(text)

    def absolute(href: str) -> str:
        return canonical(href, base, sort_query=sort_query, encoding=encoding)

    base = url
    if (node := tree.css_first("base[href]")) is not None:
        try:
            base = canonical(node.attributes.get("href") or "", url, keep_tracking=True)
        except BadURL:
            base = url
    own, values, reserved = "", list[str](), False
    for node in tree.css("meta[name]"):
        name, value = (node.attributes.get("name") or "").lower(), node.attributes.get("content") or ""
        if name in ("robots", token.lower()):
            values.append(value)
        reserved |= name == "tdm-reservation" and value.strip() == "1"
    if (node := tree.css_first('link[rel~="canonical" i][href]')) is not None:
        try:
            own = absolute(node.attributes.get("href") or "")
        except BadURL:
            own = ""
    return Page(
        text, encoding, HTML, list(_links(tree, absolute)), "" if own == url else own,
        marks_of(values, headers, token, reserved),
    )  # fmt: skip


def _charset(content_type: str) -> str:
    match = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", content_type, re.IGNORECASE)
    return match[1] if match else ""


def _links(tree: LexborHTMLParser, absolute: Callable[[str], str]) -> Iterator[Link]:
    """Every link of a page once, in the order of the page: anchors, areas, frames, and a refresh to elsewhere."""
    seen: dict[str, str] = {}
    for node in tree.css("a[href], area[href], frame[src], meta[http-equiv][content]"):
        given = node.attributes
        href = (given.get("href") or given.get("src") or "").strip()
        if len(href) > MOST_HREF:
            seen.setdefault(href[:500], "the URL is too long")
            continue
        if node.tag == "meta":
            match = re.search(r"url\s*=\s*['\"]?([^'\"]+)", (given.get("content") or "")[:MOST_HREF], re.IGNORECASE)
            href = match[1].strip() if match and (given.get("http-equiv") or "").lower() == "refresh" else ""
        if not href or href.startswith("#"):
            continue
        try:
            url, refused = absolute(href), ""
        except NotHTTP:
            continue
        except BadURL as error:
            url, refused = href[:500], f"not the address of a page: {error}"
        if not refused and "nofollow" in (given.get("rel") or "").lower().split():
            refused = NOFOLLOW
        seen[url] = refused if seen.get(url, refused) else ""  # followed if any of its links may be
        if len(seen) >= MOST_LINKS:
            break
    return (Link(url, refused) for url, refused in seen.items())
