"""RSS and Atom feeds: a document an entry, its markup taken off. A feed that has moved on is a file like any other:
name it by its URL and what it held when the run was planned is what counts."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fledge.core.errors import Problem, need
from fledge.core.language import t
from fledge.data.sources import Setting
from fledge.records.formats import Unusable
from fledge.records.kinds import Document, Record
from fledge.records.raw.markup import plain
from fledge.records.raw.packed import open_packed


def read(file: Path, setting: Setting) -> Iterator[Record]:
    """The entries, with `url`, `title`, `date` and `author` in `meta`. An entry without a text (a title alone) is set
    aside; so is one that stands twice."""
    feedparser = need("feedparser", "data")
    with open_packed(file, setting.limits) as stream:
        content = stream.read(setting.limits.row + 1)
    if len(content) > setting.limits.row:
        raise Unusable(Problem(t("the feed is too long"), where=str(file), found=f"> {setting.limits.row} B"))
    feed = feedparser.parse(content, sanitize_html=False)
    if feed.bozo and not feed.entries:
        raise Unusable(Problem(t("is not a feed"), where=str(file), found=str(feed.get("bozo_exception", ""))[:200]))
    language = str(feed.feed.get("language", ""))[:2].lower()
    seen: set[str] = set()
    for number, entry in enumerate(feed.entries):
        where = f"{file.name}[{number}]"
        identity = entry.get("id") or entry.get("link") or ""
        text = _text(entry)
        if identity and identity in seen:
            setting.reject("the entry stands twice in the feed", identity, text, where)
        elif not text:
            setting.reject("the entry has no text", "", entry.get("title", ""), where)
        else:
            seen.add(identity)
            meta = {
                "url": entry.get("link", ""), "title": html.unescape(entry.get("title", "")),
                "date": entry.get("published", "") or entry.get("updated", ""), "author": entry.get("author", ""),
            }  # fmt: skip
            yield Document(text, "", language, "", {key: value for key, value in meta.items() if value})


def _text(entry: Any) -> str:
    """The whole content where the feed carries it, else the summary; the longest of several."""
    candidates = [part.get("value", "") for part in entry.get("content", [])] + [entry.get("summary", "")]
    return max(map(plain, candidates), key=len)
