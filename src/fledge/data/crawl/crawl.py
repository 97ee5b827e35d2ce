"""The crawl itself: batches of the frontier, hosts side by side, one request at a time to each.

    Crawler(options, seed, work, events).run() ; then .write(out)

What it leaves out: JavaScript, forms, logins, cookies, proxies, HTTP/2, anything but HTML and plain text.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge import __version__
from fledge.core.artifact import digest_of
from fledge.core.errors import FledgeError, Problem
from fledge.core.events import Emitter
from fledge.core.language import t
from fledge.data.crawl.archive import Archive, Spot
from fledge.data.crawl.fetch import Fetcher, FetchFailed, Headers, Response, unpack
from fledge.data.crawl.frontier import Due, Found, Frontier, Outcome
from fledge.data.crawl.page import HTML, OTHER, TEXT, header, read_page, sniff
from fledge.data.crawl.robots import MOST_BYTES as ROBOTS_BYTES
from fledge.data.crawl.robots import MOST_REDIRECTS, MOST_SECONDS, Robots, product_token
from fledge.data.crawl.scope import Scope, host_pattern
from fledge.data.crawl.sitemap import MOST_BYTES as SITEMAP_BYTES
from fledge.data.crawl.sitemap import read_sitemap
from fledge.data.crawl.urls import BadURL, canonical, split
from fledge.data.ngrams import hash64
from fledge.records.raw.encodings import text_in

if TYPE_CHECKING:
    from fledge.data.crawl.stages import Crawl

AGAIN = (408, 425, 429, 500, 502, 503, 504)
WAIT = (429, 503)  # the whole host is to be left alone for a while
FIRST_WAIT = 1.0  # seconds before the second try; each later one doubles it
MOST_RULES = 2_000  # parsed robots.txt kept in memory; the frontier has all of them
DEAD_AFTER = 5  # URLs in a row that got no answer at all, each tried to the end


class NothingFound(FledgeError):
    """Not one page was to be had."""


@dataclass
class Host:
    """What politeness needs to know of a host: when it may be asked next, and how often it was silent."""

    free_at: float = 0.0
    silent: int = 0


@dataclass
class Rules:
    """What an origin allows: its robots.txt, or why nothing of it may be asked for."""

    robots: Robots
    refused: str = ""  # "reason: value"
    until: float = float("inf")  # by the wall clock: a robots.txt is asked for again after a day


@dataclass(order=True)
class Turn:
    """A URL in its host's line: first tries in their order, then those that wait for another."""

    ready: float
    due: Due
    attempt: int = field(default=0, compare=False)


class Crawler:
    """One crawl. All it knows lies in `work` (the frontier and the archive): a new Crawler there goes on."""

    def __init__(self, options: Crawl, seed: int, work: Path, events: Emitter) -> None:
        self.options, self.seed, self.events = options, seed, events
        self.token = product_token(options.user_agent)
        self.starts = [canonical(url, sort_query=options.sort_query) for url in options.start]
        hosts = [host_pattern(host) for host in options.allow_hosts]
        scope = Scope(
            [*hosts, *(split(url).host for url in self.starts)], options.depth, options.include, options.exclude,
            options.since, options.per_pattern,
        )  # fmt: skip
        self.frontier = Frontier(work / "frontier.db", scope, options.pages, options.bytes)
        about = {
            "software": f"fledge/{__version__}", "format": "WARC File Format 1.1", "http-header-user-agent":
            options.user_agent, "robots": "RFC 9309" if options.obey_robots else "ignored",
        }  # fmt: skip
        self.archive = Archive(work / "warc", self.frontier.archive_end, about)
        self._hosts: dict[str, Host] = {}
        self._rules: dict[str, Rules] = {}
        self._slots = asyncio.Semaphore(options.concurrency)
        self._began, self._answers = time.monotonic(), 0

    def run(self) -> None:
        """Ask for everything that is to be had within the budgets. Interrupted at any point, it can be run again."""
        try:
            asyncio.run(self._run())
        except ExceptionGroup as several:  # a task group wraps what its tasks raise
            raise several.exceptions[0] from several
        finally:
            self.archive.close()

    async def _run(self) -> None:
        self.frontier.begin(self.starts)
        options = self.options
        async with Fetcher(
            options.user_agent, options.timeout, options.concurrency, options.allow_private
        ) as self.fetcher:
            while batch := self.frontier.batch():
                lines: dict[str, list[Due]] = {}
                for due in batch:
                    lines.setdefault(due.host, []).append(due)
                async with asyncio.TaskGroup() as group:
                    for host, line in lines.items():
                        pace = self._hosts.setdefault(host, Host(silent=self.frontier.silent(host)))
                        group.create_task(self._serve(pace, line))

    async def _serve(self, host: Host, line: Sequence[Due]) -> None:
        """One host's URLs, one at a time, with the pauses it wants between them."""
        turns = [Turn(0.0, due) for due in line]
        heapify(turns)
        while turns:
            turn = heappop(turns)
            due = turn.due
            if host.silent >= DEAD_AFTER:
                self._done(due, Outcome("the host does not answer", due.host, asked=False))
                continue
            rules = await self._rules_for(due, host)
            pause = max(self.options.delay, rules.robots.delay if self.options.obey_robots else 0.0)
            if closed := self._closed(due, rules):
                self._done(due, closed)
                continue
            await asyncio.sleep(max(turn.ready, host.free_at) - time.monotonic())
            answer = await self._ask(due, host, pause)
            wait = self._wait(due, turn.attempt, answer, host)
            if wait and turn.attempt < self.options.retries and wait <= self.options.max_delay:
                ready = time.monotonic() + wait
                if isinstance(answer, FetchFailed):  # the host may be down: nothing else of it before this one
                    host.free_at, ready = max(host.free_at, ready), 0.0
                heappush(turns, Turn(ready, due, turn.attempt + 1))
                continue
            if isinstance(answer, FetchFailed):
                host.silent += answer.again
                self._done(due, Outcome(answer.reason, answer.value))
            else:
                host.silent = 0
                await self._take(due, answer)

    def _closed(self, due: Due, rules: Rules) -> Outcome | None:
        """What robots.txt says to a URL, if it says no."""
        if not self.options.obey_robots:
            return None
        if rules.refused:
            reason, _, value = rules.refused.partition(": ")
            return Outcome(reason, value, asked=False)
        if not rules.robots.allows(due.url):
            return Outcome("robots.txt forbids it", asked=False)
        if rules.robots.delay > self.options.max_delay:
            return Outcome("robots.txt asks for too long a pause", f"{rules.robots.delay:g} s", asked=False)
        return None

    async def _ask(self, due: Due, host: Host, pause: float) -> Response | FetchFailed:
        """One request, counted from its end: a slow server gets more time to breathe."""
        most = {"sitemap": SITEMAP_BYTES, "robots": ROBOTS_BYTES}.get(due.kind, self.options.max_page_bytes)
        try:
            async with self._slots:
                return await self.fetcher.get(due.url, most, _unwanted if due.kind == "page" else None)
        except FetchFailed as failure:
            return failure
        finally:
            host.free_at = time.monotonic() + pause

    def _wait(self, due: Due, attempt: int, answer: Response | FetchFailed, host: Host) -> float:
        """Seconds before another try; 0 where none would help. Doubling, with a jitter that depends on the seed."""
        again = answer.again if isinstance(answer, FetchFailed) else answer.status in AGAIN
        if not again:
            return 0.0
        jitter = 0.5 + hash64(f"{self.seed}:{due.url}:{attempt}") / 2**64
        wait = float(FIRST_WAIT * 2**attempt * jitter)
        if isinstance(answer, Response):
            wait = max(wait, answer.retry_after)
            if answer.status in WAIT and wait <= self.options.max_delay:
                host.free_at = max(host.free_at, time.monotonic() + wait)
        return wait

    async def _take(self, due: Due, answer: Response) -> None:
        """An answer: what it means, then into the archive and the frontier, with nothing between the two."""
        try:
            outcome = await asyncio.to_thread(self._meaning, due, answer)
        except (ValueError, LookupError, RecursionError) as error:  # one odd page does not end a crawl
            outcome = Outcome("cannot be read", f"{type(error).__name__}: {error}"[:200], bytes=len(answer.wire))
        spot = self.archive.add(answer) if not answer.refused else None
        self._done(due, replace(outcome, about={**outcome.about, "spot": spot}) if outcome.about else outcome)

    def _meaning(self, due: Due, answer: Response) -> Outcome:
        size, kind = len(answer.wire), header(answer.headers, "content-type")
        if answer.location:
            try:
                target = canonical(answer.location, due.url, sort_query=self.options.sort_query)
            except BadURL as error:
                return Outcome("redirects to no page", str(error), bytes=size)
            return Outcome("redirects elsewhere", target, bytes=size, found=[Found(target, "redirect")])
        if answer.status not in (200, 203):
            asks = header(answer.headers, "retry-after")
            return Outcome(f"HTTP {answer.status}", f"Retry-After: {asks}" if asks else answer.phrase, bytes=size)
        if answer.refused:
            reason, _, value = answer.refused.partition(": ")
            return Outcome(reason, value, bytes=size)
        if due.kind == "sitemap":
            return self._sitemap(due, answer.body, size)
        if not answer.body.strip():
            return Outcome("an empty page", bytes=size)
        form, _ = sniff(answer.body[:2048], kind)
        page = read_page(due.url, answer.body, answer.headers, form, self.token, self.options.sort_query)
        obeyed = self.options.obey_robots
        found = [Found(link.url, "link", link.refused if obeyed else "") for link in page.links]
        if obeyed and page.marks.nofollow:
            found = []
        if page.canonical and self.frontier.scope.has_host(split(page.canonical).host):
            found.append(Found(page.canonical, "canonical"))
        if obeyed and page.marks.refused:
            return Outcome("the page asks not to be kept", page.marks.refused, bytes=size, found=found)
        about = {
            "format": page.format, "content_type": kind[:200], "encoding": page.encoding,
            "coding": header(answer.headers, "content-encoding"),
        }  # fmt: skip
        digest = hashlib.sha256(answer.body).hexdigest()
        return Outcome(bytes=size, digest=digest, canonical=page.canonical, about=about, found=found)

    def _sitemap(self, due: Due, body: bytes, size: int) -> Outcome:
        try:
            body = unpack(body, "gzip", SITEMAP_BYTES) if body.startswith(b"\x1f\x8b") else body
        except FetchFailed as failure:
            return Outcome(failure.reason, failure.value, bytes=size)
        entries = read_sitemap(due.url, body, self.options.sort_query)
        found = [Found(e.url, "sitemap" if e.sitemap else "listed", lastmod=e.lastmod) for e in entries]
        return Outcome("a sitemap", str(len(found)), bytes=size, found=found)

    def _done(self, due: Due, outcome: Outcome) -> None:
        self.frontier.done(due, outcome, self.archive.end, self._hosts[due.host].silent)
        self._answers += outcome.asked
        rate = self._answers / max(time.monotonic() - self._began, 1e-3)
        self.events.progress(self.frontier.asked, self.options.pages, "pages", rate=rate, bytes=self.frontier.bytes)

    async def _rules_for(self, due: Due, host: Host) -> Rules:
        """The rules of a URL's origin: remembered, from the frontier, or from its robots.txt."""
        options, origin = self.options, split(due.url).origin
        if origin in self._rules and time.time() < self._rules[origin].until:
            return self._rules[origin]
        if not (options.obey_robots or options.sitemaps):
            return Rules(Robots("", self.token))
        known = self.frontier.origin(origin, time.time() - MOST_SECONDS)
        if known is None:
            answer, refused = await self._robots_txt(origin, host)
            body = answer.body[:ROBOTS_BYTES] if answer is not None and answer.status == 200 else b""
            robots = Robots.of_bytes(body, self.token)
            sitemaps = self._sitemaps(origin, robots) if options.sitemaps and not refused else []
            if answer is not None:
                self.archive.add(answer)
            self.frontier.met(origin, body, refused, due, sitemaps, self.archive.end)
            known = body, refused, time.time()
        if len(self._rules) >= MOST_RULES:
            del self._rules[next(iter(self._rules))]
        self._rules[origin] = Rules(Robots.of_bytes(known[0], self.token), known[1], known[2] + MOST_SECONDS)
        return self._rules[origin]

    def _sitemaps(self, origin: str, robots: Robots) -> list[str]:
        """Those that robots.txt names, or the one place where a sitemap lies when nobody says so."""
        found = []
        for url in robots.sitemaps or ["/sitemap.xml"]:
            try:
                found.append(canonical(url, f"{origin}/", sort_query=self.options.sort_query))
            except BadURL:
                continue
        return found

    async def _robots_txt(self, origin: str, host: Host) -> tuple[Response | None, str]:
        """The last answer, and why it closes the origin: not there (4xx) is as good as empty, an error of the server
        or no answer forbids everything (RFC 9309 §2.3.1). 429 is taken for the latter, as Google does."""
        url, redirects, attempt = f"{origin}/robots.txt", 0, 0
        while True:
            due = Due(0, url, "", "robots")
            await asyncio.sleep(host.free_at - time.monotonic())
            answer = await self._ask(due, host, self.options.delay)
            wait = self._wait(due, attempt, answer, host)
            if wait and attempt < self.options.retries and wait <= self.options.max_delay:
                await asyncio.sleep(wait)
                attempt += 1
                continue
            if isinstance(answer, FetchFailed):
                return None, f"{answer.reason}: {answer.value}"
            if answer.status >= 500 or answer.status == 429:
                return answer, f"robots.txt cannot be had: HTTP {answer.status}"
            if not 300 <= answer.status < 400 or redirects >= MOST_REDIRECTS:
                return answer, ""
            redirects += 1
            try:
                url = canonical(answer.location, url, keep_tracking=True)
            except BadURL:
                return answer, ""

    def write(self, out: Path) -> dict[str, Any]:
        """The pages as documents, every other URL as a rejected row, the archive beside them. Returns the metrics."""
        from fledge.records.kinds import Document
        from fledge.records.rejects import Rejects
        from fledge.records.shards import ShardWriter

        size, hosts, formats = 0, Counter[str](), Counter[str]()
        with Rejects(out) as rejects, ShardWriter(out, "documents") as writer:
            for row in self.frontier.rows():
                if row.state != "kept":
                    rejects.add("crawl", row.reason, row.value, row=row.url, where=row.parent)
                    continue
                about, place = row.about, split(row.url)
                body = unpack(self.archive.read(Spot(*about["spot"])), about["coding"], self.options.max_page_bytes)
                meta = {
                    "url": row.url, "format": about["format"], "content_type": about["content_type"],
                    "encoding": about["encoding"], "depth": str(row.depth),
                } | ({"lastmod": row.lastmod} if row.lastmod else {})  # fmt: skip
                text = text_in(body, about["encoding"])
                writer.write(Document(text, digest_of(row.url)[:16], "", place.host, meta))
                size += len(text.encode())
                hosts[place.host] += 1
                formats[about["format"]] += 1
                self.events.progress(writer.rows)
            if not writer.rows:
                raise self._nothing(rejects.reasons["crawl"])
            refused = rejects.reasons
        return {
            "rows": hosts.total(), "bytes": size, "rows_by_host": dict(sorted(hosts.items())), "rejected": refused,
            "rows_by_format": dict(sorted(formats.items())), "asked": self.frontier.asked,
            "downloaded_bytes": self.frontier.bytes, "warc_files": self.archive.deliver(out / "warc"),
        }  # fmt: skip

    def _nothing(self, reasons: dict[str, int]) -> NothingFound:
        first = sorted(reasons.items(), key=lambda item: -item[1])[:5]
        return NothingFound(
            Problem(
                t("the crawl brought no page"),
                found="; ".join(f"{reason} ({rows})" for reason, rows in first),
                fix=t("look at the start pages, the allowed hosts and the robots.txt of the site"),
            )
        )

    def close(self) -> None:
        """Let go of the files."""
        self.frontier.close()


def _unwanted(status: int, headers: Headers, start: bytes) -> str:
    """Why the rest of a body is not worth reading: it is no HTML and no plain text."""
    form, found = sniff(start, header(headers, "content-type"))
    return "" if form in (HTML, TEXT) else f"not a page: {found or OTHER}"


def crawl(options: Crawl, seed: int, work: Path, out: Path, events: Emitter) -> dict[str, Any]:
    """Crawl, and write what came below `out`. What lies in `work` is gone on with. Returns the metrics.

    Where nothing at all came, the next attempt begins anew: the reason may have been the network.
    """
    try:
        with closing(Crawler(options, seed, work, events)) as crawler:
            crawler.run()
            return crawler.write(out)
    except NothingFound:
        for file in work.glob("frontier.db*"):
            file.unlink()
        shutil.rmtree(work / "warc")
        raise
    except (OSError, sqlite3.OperationalError) as error:
        raise FledgeError(Problem(t("the crawl cannot write its files"), found=str(error))) from error
