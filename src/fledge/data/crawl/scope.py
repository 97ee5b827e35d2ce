"""Which URLs a crawl takes: the hosts, the depth, the user's patterns, and no traps."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fledge.data.crawl.page import named_otherwise
from fledge.data.crawl.sitemap import MOST_SITEMAPS, is_older
from fledge.data.crawl.urls import BadURL, canonical, repeats, split

MOST_CHARACTERS = 2_000
MOST_SEGMENTS = 40
PATTERN_FULL = "too many URLs of one pattern"


def host_pattern(text: str) -> str:
    """A host as it stands in canonical URLs, `*.` before it kept. Raises `BadURL` for what is none."""
    star = "*." if text.startswith("*.") else ""
    place = split(canonical(f"http://{text.removeprefix('*.')}"))
    if place.target != "/" or place.port != 80:
        raise BadURL("a host alone is wanted, without a scheme, a port or a path")
    return star + place.host


class Scope:
    """The rules of one crawl. Hosts: `example.org` (with and without `www.`), `*.example.org` (and all below it)."""

    def __init__(
        self,
        hosts: Sequence[str],
        depth: int,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        since: str = "",
        per_pattern: int = 1_000,
    ) -> None:
        self.hosts, self.depth, self.since = [host.lower() for host in hosts], depth, since
        self.pattern_limits = (per_pattern, 10 * per_pattern)  # with the names of its parameters; with any
        self.most_sitemaps = MOST_SITEMAPS
        self._include = [re.compile(pattern) for pattern in include]
        self._exclude = [re.compile(pattern) for pattern in exclude]

    def has_host(self, host: str) -> bool:
        """Whether a host belongs to the crawl."""
        bare = host.removeprefix("www.")
        for allowed in self.hosts:
            if allowed.startswith("*."):
                if host == allowed[2:] or host.endswith(allowed[1:]):
                    return True
            elif bare == allowed.removeprefix("www."):
                return True
        return False

    def refusal(self, url: str, depth: int, kind: str = "page", lastmod: str = "") -> tuple[str, str]:
        """(reason, value) why a canonical URL is not taken; two empty strings where it is."""
        host = split(url).host
        if len(url) > MOST_CHARACTERS:
            return "the URL is too long", str(len(url))
        if not self.has_host(host):
            return "not a host of this crawl", host
        if depth > self.depth or (kind == "sitemap" and depth >= self.depth):
            return "too deep", str(depth)
        if url.count("/") > MOST_SEGMENTS:
            return "its path is too deep", str(url.count("/"))
        if repeated := repeats(url):
            return "its path repeats itself", repeated
        if kind == "sitemap":
            return "", ""
        if match := next(filter(None, (pattern.search(url) for pattern in self._exclude)), None):
            return "excluded", match.re.pattern
        if self._include and not any(pattern.search(url) for pattern in self._include):
            return "not included", ""
        if suffix := named_otherwise(url):
            return "not a page by its name", suffix
        if self.since and is_older(lastmod, self.since):
            return "not changed since", lastmod
        return "", ""
