"""The stage that reads the web: `data.crawl`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fledge.core.artifact import Documents
from fledge.core.errors import Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.stage import Estimate, Size, Stage
from fledge.core.units import Bytes, Count

PAGE_BYTES = 60_000  # of HTML: about the mean of the web


class Crawl(Stage, use="data.crawl", version=1):
    """Pages of the web as documents that hold raw HTML (meta: url, format), with WARC files beside them.

    Polite by default: robots.txt (RFC 9309), one request at a time to a host, a pause between two, nofollow, noindex.
    Every URL seen and not taken is a rejected row with its reason.

    The web is not reproducible, but what is made of it is: where the servers give the same answers, records and
    rejected rows are the same to the byte, whatever the concurrency, the order of the answers and the kills between.
    Time-outs and errors of a server are answers, too. The WARC files hold dates and differ. A crawl is fingerprinted
    by its config alone, so it is made once and kept: another word in `edition` makes it anew.
    """

    extras: ClassVar = dict.fromkeys(("charset_normalizer", "protego", "selectolax", "warcio"), "data")

    start: list[str] = Field(min_length=1, description="URLs of the pages to begin with")
    allow_hosts: list[str] = Field(
        default_factory=list,
        description="hosts besides those of `start`: example.org (www. or not), *.example.org (it and all below)",
    )
    include: list[str] = Field(default_factory=list, description="regular expressions: only URLs with one of them")
    exclude: list[str] = Field(default_factory=list, description="regular expressions: no URL with one of them")
    depth: int = Field(3, ge=0, description="links from a start page at most")
    pages: Count = Field(1_000, ge=1, description="budget: pages asked for, an error counting as one")
    bytes: Bytes | None = Field(None, ge=1, description="budget: bytes read; checked between batches, so about")
    delay: float = Field(1.0, ge=0, description="seconds between two requests to a host; robots.txt may ask for more")
    max_delay: float = Field(60, ge=0, description="the longest pause that is granted; who asks for more is left alone")
    concurrency: Annotated[int, Field(ge=1, le=512)] = Field(16, description="hosts asked at the same time")
    timeout: float = Field(30, gt=0, description="seconds for a whole answer, from the connection to the last byte")
    retries: int = Field(3, ge=0, le=10, description="more tries after an error that may pass, each waiting longer")
    max_page_bytes: Bytes = Field(5_000_000, ge=1, description="a longer page is not taken, packed or not")
    per_pattern: Count = Field(
        1_000, ge=1, description="URLs of one pattern (/day/N/N?view) at most: calendars without end"
    )
    user_agent: str = Field("fledge", min_length=1, description="who you are: name/version (+where you can be reached)")
    obey_robots: bool = Field(True, description="robots.txt, nofollow, noindex and reservations of the page")
    sitemaps: bool = Field(True, description="read the sitemaps, too")
    since: str = Field("", description="leave out pages whose sitemap dates them before this day (2026-11-22)")
    sort_query: bool = Field(False, description="?b=1&a=2 and ?a=2&b=1 are one page")
    allow_private: bool = Field(False, description="addresses of this machine and of your own network as well")
    edition: str = Field("", description="any word, such as a month: another word is another crawl")

    def check(self) -> Iterator[Problem]:
        from fledge.data.crawl.scope import host_pattern
        from fledge.data.crawl.urls import BadURL, canonical

        for url in self.start:
            try:
                canonical(url)
            except BadURL:
                yield Problem(t("a start page must be the URL of a page"), found=url, allowed="https://example.org/")
        for host in self.allow_hosts:
            try:
                host_pattern(host)
            except BadURL:
                yield Problem(t("not a host"), found=host, allowed="example.org, *.example.org")
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                yield Problem(t("not a regular expression"), found=f"{pattern} ({error})")
        if self.since and not re.fullmatch(r"\d{4}(-\d\d){0,2}", self.since):
            yield Problem(t("not a date"), found=self.since, allowed="2026, 2026-11, 2026-11-22")
        if not re.match(r"[A-Za-z_-]+", self.user_agent) or re.search(r"[^\x20-\x7e]", self.user_agent):
            yield Problem(
                t("a user agent begins with a name of letters and is ASCII"), found=self.user_agent,
                allowed="mybot/1.0 (+https://example.org/bot)",
            )  # fmt: skip

    def run(self, job: Job) -> Documents:
        from fledge.data.crawl.crawl import crawl

        return Documents(job.out, crawl(self, job.rng_seed("crawl"), job.work, job.out, job.events))

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        hosts = max(1, min(len(self.start) + len(self.allow_hosts), self.concurrency))
        each = self.delay + 0.3
        size = min(self.pages * PAGE_BYTES, self.bytes or 1 << 62)
        seconds = (2 + each * self.pages / hosts / 4, 10 + 2 * each * self.pages)
        memory = (0.15e9, 0.3e9 + 2 * self.concurrency * self.max_page_bytes)
        return Estimate(seconds, memory, size, {"": Size(self.pages, size)})
