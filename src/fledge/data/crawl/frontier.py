"""The frontier: every URL that was ever seen, what became of it, and what comes next. One SQLite file.

A URL is `new`, then `due` (in the batch under way), then `got` (answered, not yet weighed against the others), and in
the end `kept` or `out`, with the reason. The crawl goes breadth first in batches. What a batch found is weighed when
all of it is there, in the order of the pages and of the links in them: so neither the order in which answers come nor
a kill decides what is taken. Every answer is one transaction.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fledge.data.crawl.archive import Spot
from fledge.data.crawl.page import NOFOLLOW
from fledge.data.crawl.scope import PATTERN_FULL, Scope
from fledge.data.crawl.urls import patterns, split

MOST_REDIRECTS = 10
PER_HOST = 100  # URLs of one host in a batch: the others do not wait long for it
MOST_IN_BATCH = 5_000
MEAN_BYTES = 100_000  # of a page, until pages have been seen
BUDGET_PAGES, BUDGET_BYTES = "the budget of pages is spent", "the budget of bytes is spent"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS urls (
  id INTEGER PRIMARY KEY, url TEXT NOT NULL UNIQUE, host TEXT NOT NULL, depth INTEGER NOT NULL, kind TEXT NOT NULL,
  parent INTEGER, hops INTEGER NOT NULL, lastmod TEXT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
  value TEXT NOT NULL DEFAULT '', asked INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0, digest TEXT,
  canonical TEXT NOT NULL DEFAULT '', about TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS waiting ON urls (state, depth, host, id, kind);
CREATE INDEX IF NOT EXISTS bodies ON urls (digest) WHERE digest IS NOT NULL;
CREATE TABLE IF NOT EXISTS links (
  id INTEGER PRIMARY KEY, parent INTEGER NOT NULL, url TEXT NOT NULL, kind TEXT NOT NULL, refused TEXT NOT NULL,
  lastmod TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS named ON links (parent, id);
CREATE TABLE IF NOT EXISTS patterns (pattern TEXT PRIMARY KEY, urls INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS origins (
  origin TEXT PRIMARY KEY, robots BLOB, refused TEXT NOT NULL, fetched REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hosts (host TEXT PRIMARY KEY, silent INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


class Due(NamedTuple):
    """A URL that is to be asked for."""

    id: int
    url: str
    host: str
    kind: str  # page or sitemap


class Found(NamedTuple):
    """A URL that an answer named: by a link, a redirect, `rel=canonical`, a sitemap (a page `listed`) or an index."""

    url: str
    kind: str = "link"  # link, redirect, canonical, listed, sitemap
    refused: str = ""
    lastmod: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a URL that was asked for, or that robots.txt or an address closed. No reason: it is a page."""

    reason: str = ""
    value: str = ""
    asked: bool = True
    bytes: int = 0
    digest: str | None = None  # of the text's bytes
    canonical: str = ""
    about: dict[str, Any] | None = None  # format, encoding, content_type, and where the archive holds it
    found: Sequence[Found] = ()


class Row(NamedTuple):
    """How a URL ended."""

    id: int
    url: str
    depth: int
    state: str  # kept or out
    reason: str
    value: str
    parent: str  # URL of the page that named it
    lastmod: str
    canonical: str
    about: dict[str, Any]


class Frontier:
    """`batch()` says what to ask for, `done()` takes what came, until `batch()` is empty."""

    def __init__(self, file: Path, scope: Scope, pages: int, most_bytes: int | None) -> None:
        self.scope, self.pages, self.most_bytes = scope, pages, most_bytes
        self._db = sqlite3.connect(file, isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "cache_size=-65536", "temp_store=MEMORY"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(_SCHEMA)
        counted = "SELECT COUNT(*) FILTER (WHERE kind = 'page'), COUNT(*), TOTAL(bytes) FROM urls WHERE asked = 1"
        self.asked, self._answers, size = self._db.execute(counted).fetchone()
        self.bytes = int(size)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    @property
    def archive_end(self) -> Spot:
        """Where the archive ended when the last answer was taken."""
        row = self._db.execute("SELECT value FROM facts WHERE name = 'archive'").fetchone()
        return Spot(*json.loads(row[0])) if row else Spot(0, 0)

    def begin(self, starts: Sequence[str]) -> None:
        """Put in the start pages. A frontier that holds them already stays as it is."""
        self._db.execute("BEGIN")
        for url in starts:
            self._insert(url, 0, "page", None, 0, "", "")
        self._db.execute("COMMIT")

    def origin(self, origin: str, not_before: float) -> tuple[bytes, str, float] | None:
        """(robots.txt, why all of the origin is closed, when that was) if known and not older than `not_before`."""
        query = "SELECT robots, refused, fetched FROM origins WHERE origin = ? AND fetched >= ?"
        row: tuple[bytes, str, float] | None = self._db.execute(query, (origin, not_before)).fetchone()
        return row

    def met(self, origin: str, robots: bytes, refused: str, by: Due, sitemaps: Sequence[str], end: Spot) -> None:
        """Keep an origin's robots.txt. Its sitemaps count as found by the first URL that led there, and once."""
        self._db.execute("BEGIN")
        known = self._db.execute("SELECT 1 FROM origins WHERE origin = ?", (origin,)).fetchone()
        self._db.execute("REPLACE INTO origins VALUES (?, ?, ?, ?)", (origin, robots, refused, time.time()))
        if not known:
            self._note(by.id, [Found(url, "sitemap") for url in sitemaps])
        self._archived(end)
        self._db.execute("COMMIT")

    def silent(self, host: str) -> int:
        """How many URLs of a host in a row got no answer."""
        row = self._db.execute("SELECT silent FROM hosts WHERE host = ?", (host,)).fetchone()
        return int(row[0]) if row else 0

    def done(self, due: Due, outcome: Outcome, end: Spot, silent: int) -> None:
        """Take what became of a URL: one transaction, so that it is done whole or not at all."""
        state = "out" if outcome.reason else "got"
        self._db.execute("BEGIN")
        self._db.execute(
            "UPDATE urls SET state = ?, reason = ?, value = ?, asked = ?, bytes = ?, digest = ?, canonical = ?,"
            " about = ? WHERE id = ?",
            (
                state, outcome.reason, outcome.value, outcome.asked, outcome.bytes, outcome.digest, outcome.canonical,
                json.dumps(outcome.about or {}), due.id,
            ),
        )  # fmt: skip
        self._db.execute("REPLACE INTO hosts VALUES (?, ?)", (due.host, silent))
        self._note(due.id, outcome.found)
        self._archived(end)
        self._db.execute("COMMIT")
        self.asked += outcome.asked and due.kind == "page"
        self._answers += outcome.asked
        self.bytes += outcome.bytes

    def _note(self, parent: int, found: Sequence[Found]) -> None:
        rows = [(parent, item.url, item.kind, item.refused, item.lastmod) for item in found]
        self._db.executemany("INSERT INTO links (parent, url, kind, refused, lastmod) VALUES (?, ?, ?, ?, ?)", rows)

    def _archived(self, end: Spot) -> None:
        self._db.execute("REPLACE INTO facts VALUES ('archive', ?)", (json.dumps(end),))

    def batch(self) -> list[Due]:
        """What to ask for next: the rest of the batch under way, or the next one. Empty: the crawl is over."""
        query = "SELECT id, url, host, kind FROM urls WHERE state = 'due' ORDER BY id"
        due = [Due(*row) for row in self._db.execute(query)]
        if not due:
            self._settle()
            due = self._next()
        return due

    def _next(self) -> list[Due]:
        left = self.pages - self.asked
        most = min(left, MOST_IN_BATCH)
        if self.most_bytes is not None and left > 0:
            mean = self.bytes / self._answers if self._answers else MEAN_BYTES
            most = min(most, max(16, int((self.most_bytes - self.bytes) / max(mean, 1))))
        spent = BUDGET_PAGES if left <= 0 else ""
        if self.most_bytes is not None and self.bytes >= self.most_bytes:
            spent = BUDGET_BYTES
        if spent:
            self._db.execute("UPDATE urls SET state = 'out', reason = ? WHERE state = 'new'", (spent,))
            return []
        waiting = "SELECT COUNT(*) FROM urls WHERE state = 'new' AND kind = 'page'"
        enough = self._db.execute(waiting).fetchone()[0] >= left  # more sitemaps would only name what cannot be taken
        kinds = "('page')" if enough else "('page', 'sitemap')"
        self._db.execute("BEGIN")
        self._db.execute(
            "UPDATE urls SET state = 'due' WHERE id IN (SELECT id FROM (SELECT id, ROW_NUMBER() OVER (PARTITION BY host"
            f" ORDER BY id) AS turn FROM urls WHERE state = 'new' AND kind IN {kinds} AND depth = (SELECT MIN(depth)"
            f" FROM urls WHERE state = 'new' AND kind IN {kinds})) WHERE turn <= ? ORDER BY turn, id LIMIT ?)",
            (PER_HOST, most),
        )
        self._db.execute("COMMIT")
        query = "SELECT id, url, host, kind FROM urls WHERE state = 'due' ORDER BY id"
        return [Due(*row) for row in self._db.execute(query)]

    def _settle(self) -> None:
        """Weigh what a batch brought, in its order: pages that repeat another's bytes go out with their links, and
        every link becomes a URL to ask for or one refused."""
        self._db.execute("BEGIN")
        answered = self._db.execute("SELECT id, digest FROM urls WHERE state = 'got' ORDER BY id").fetchall()
        for number, digest in answered:
            query = "SELECT url FROM urls WHERE digest = ? AND state = 'kept' LIMIT 1"
            twin = self._db.execute(query, (digest,)).fetchone()
            if twin:
                update = (
                    "UPDATE urls SET state = 'out', reason = 'the same bytes as another page', value = ? WHERE id = ?"
                )
                self._db.execute(update, (twin[0], number))
                self._db.execute("DELETE FROM links WHERE parent = ?", (number,))
            else:
                self._db.execute("UPDATE urls SET state = 'kept' WHERE id = ?", (number,))
        naming = "SELECT DISTINCT links.parent, depth, hops, urls.kind FROM links JOIN urls ON urls.id = links.parent"
        for parent, depth, hops, kind in self._db.execute(naming + " ORDER BY links.parent").fetchall():
            links = "SELECT url, kind, refused, lastmod FROM links WHERE parent = ? ORDER BY id"
            for fields in self._db.execute(links, (parent,)).fetchall():
                self._weigh(parent, Found(*fields), depth, hops, kind)
        self._db.execute("DELETE FROM links")
        self._db.execute("COMMIT")

    def _weigh(self, parent: int, found: Found, depth: int, hops: int, parents_kind: str) -> None:
        """One link: known, refused, or new."""
        redirect = found.kind == "redirect"
        known = self._db.execute("SELECT id, state, reason FROM urls WHERE url = ?", (found.url,)).fetchone()
        if redirect and self._is_loop(parent, found.url):
            self._say(parent, "redirect loop", found.url)
            return
        if redirect and hops + 1 > MOST_REDIRECTS:
            self._say(parent, "too many redirects", found.url)
            return
        second_chance = (NOFOLLOW,) + ((PATTERN_FULL,) if found.kind == "listed" else ())
        if known and not (known[1] == "out" and known[2] in second_chance and not found.refused):
            if found.lastmod:
                self._db.execute("UPDATE urls SET lastmod = ? WHERE id = ?", (found.lastmod, known[0]))
            return
        kind = parents_kind if redirect else "sitemap" if found.kind == "sitemap" else "page"
        at = depth + (found.kind in ("link", "listed"))
        reason, value = found.refused, ""
        if not reason:
            reason, value = self.scope.refusal(found.url, at, kind, found.lastmod)
        if not reason:
            reason, value = self._crowded(found, kind)
        if known:
            self._db.execute("DELETE FROM urls WHERE id = ?", (known[0],))
        self._insert(found.url, at, kind, parent, hops + 1 if redirect else 0, found.lastmod, reason, value)

    def _crowded(self, found: Found, kind: str) -> tuple[str, str]:
        """Whether the URL is one too many of its kind: of a pattern (what a sitemap lists is exempt), of sitemaps."""
        origin = split(found.url).origin
        names = list(patterns(found.url)) if kind == "page" else [f"sitemaps of {origin}"]
        limits = self.scope.pattern_limits if kind == "page" else (self.scope.most_sitemaps,)
        if found.kind == "listed":
            return "", ""
        for name, limit in zip(names, limits, strict=False):
            row = self._db.execute("SELECT urls FROM patterns WHERE pattern = ?", (name,)).fetchone()
            if row and row[0] >= limit:
                return (PATTERN_FULL if kind == "page" else "too many sitemaps"), f"{name} > {limit}"
        for name in names:
            add = "INSERT INTO patterns VALUES (?, 1) ON CONFLICT (pattern) DO UPDATE SET urls = urls + 1"
            self._db.execute(add, (name,))
        return "", ""

    def _is_loop(self, parent: int | None, url: str) -> bool:
        """Whether the redirects that led to `parent` began at, or passed through, `url`."""
        while parent is not None:
            at, came_from, hops = self._db.execute(
                "SELECT url, parent, hops FROM urls WHERE id = ?", (parent,)
            ).fetchone()
            if at == url:
                return True
            parent = came_from if hops else None
        return False

    def _say(self, number: int, reason: str, value: str) -> None:
        self._db.execute("UPDATE urls SET reason = ?, value = ? WHERE id = ?", (reason, value, number))

    def _insert(
        self, url: str, depth: int, kind: str, parent: int | None, hops: int, lastmod: str, reason: str, value: str = ""
    ) -> None:
        host = "" if reason else split(url).host
        self._db.execute(
            "INSERT OR IGNORE INTO urls (url, host, depth, kind, parent, hops, lastmod, state, reason, value)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (url, host, depth, kind, parent, hops, lastmod, "out" if reason else "new", reason, value),
        )

    def rows(self) -> Iterator[Row]:
        """Every URL and how it ended, in the order in which they were found; of pages that name another kept page
        as their canonical one, only that."""
        query = (
            "SELECT u.id, u.url, u.depth, u.state, u.reason, u.value, COALESCE(p.url, ''), u.lastmod, u.canonical,"
            " u.about FROM urls u LEFT JOIN urls p ON p.id = u.parent ORDER BY u.id"
        )
        for *fields, about in self._db.execute(query):
            row = Row._make([*fields, json.loads(about or "{}")])
            if row.state == "kept" and row.canonical and (better := self._canonical_of(row.url)) != row.url:
                row = row._replace(state="out", reason="another page is its canonical one", value=better)
            yield row

    def _canonical_of(self, url: str) -> str:
        """The kept page at the end of the canonical links from `url`; of pages that name each other, the first."""
        chain: dict[str, int] = {}
        while url not in chain:
            number, wanted = self._db.execute("SELECT id, canonical FROM urls WHERE url = ?", (url,)).fetchone()
            chain[url] = number
            query = "SELECT url FROM urls WHERE url = ? AND state = 'kept'"
            better = self._db.execute(query, (wanted,)).fetchone() if wanted else None
            if better is None:
                return url
            url = better[0]
        circle = list(chain)[list(chain).index(url) :]
        return min(circle, key=chain.__getitem__)
