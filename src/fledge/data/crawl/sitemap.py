"""Sitemaps (sitemaps.org, protocol 0.9): XML, an index of others, plain text, and feeds, as the protocol allows."""

from __future__ import annotations

import re
from io import BytesIO
from typing import NamedTuple
from xml.etree.ElementTree import ParseError, iterparse

from fledge.data.crawl.urls import BadURL, canonical

MOST_URLS = 50_000  # the protocol's own limits
MOST_BYTES = 52_428_800
MOST_SITEMAPS = 500  # of one origin: some sites make them without end


class Entry(NamedTuple):
    """One line of a sitemap."""

    url: str
    lastmod: str  # as the site wrote it: a W3C date, or empty
    sitemap: bool  # another sitemap, named by an index


def read_sitemap(url: str, body: bytes, sort_query: bool = False) -> list[Entry]:
    """The entries of a sitemap, canonical, each once. What stands behind an error in its XML is left out.

    A document type is refused unread (entities that expand into one another); sitemaps have none.
    """
    if re.search(rb"<!(?:DOCTYPE|ENTITY)", body[:4096], re.IGNORECASE):
        return []
    bare = body.removeprefix(b"\xef\xbb\xbf").lstrip()
    found = _from_xml(bare) if bare.startswith(b"<") else _from_text(bare)
    entries: dict[str, Entry] = {}
    for location, lastmod, sitemap in found[:MOST_URLS]:
        try:
            target = canonical(location, url, sort_query=sort_query)
        except BadURL:
            continue
        entries.setdefault(target, Entry(target, lastmod, sitemap))
    return list(entries.values())


def _from_text(body: bytes) -> list[tuple[str, str, bool]]:
    lines = body.decode("utf-8", "replace").split()
    return [(line, "", False) for line in lines if line.startswith(("http://", "https://"))]


def _from_xml(body: bytes) -> list[tuple[str, str, bool]]:
    found: list[tuple[str, str, bool]] = []
    location = lastmod = ""
    try:
        for _, element in iterparse(BytesIO(body), ("end",)):
            space, _, tag = element.tag.lower().rpartition("}")
            text = (element.text or "").strip()
            if "/sitemap-" in space:
                continue  # pictures, videos and news have addresses of their own
            if tag in ("loc", "link"):  # Atom writes <link href="…"/>
                location = location or text or element.get("href", "")
            elif tag in ("lastmod", "updated", "pubdate"):
                lastmod = text
            elif tag in ("url", "sitemap", "item", "entry"):
                if location:
                    found.append((location, lastmod, tag == "sitemap"))
                location = lastmod = ""
                element.clear()
                if len(found) >= MOST_URLS:
                    break
    except (ParseError, ValueError, LookupError):
        pass  # what came before the error is good
    return found


def is_older(lastmod: str, since: str) -> bool:
    """Whether a sitemap's date lies before `since` (`2026-11-22`). A missing or odd one does not: the page is read."""
    match = re.match(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?", lastmod)
    if match is None:
        return False
    written = "-".join(part for part in match.groups() if part)
    return written < since[: len(written)]
