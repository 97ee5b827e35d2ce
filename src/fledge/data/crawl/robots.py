"""What a site asks of robots: robots.txt by RFC 9309, and the marks that a page carries itself.

The rules' syntax (groups, longest match, `*` and `$`, the usual misspellings) is `protego`'s, the parser that Scrapy
uses. Here stands what the RFC says around it: a file that is not there (4xx) allows everything, one that cannot be
had (5xx, no answer) forbids everything, and no more than 500 KiB of it are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote

from fledge.core.errors import missing_extra

MOST_BYTES = 500 * 1024  # RFC 9309 §2.5: a crawler may stop there, not before
MOST_REDIRECTS = 5  # §2.3.1.2
MOST_SECONDS = 24 * 3600  # §2.4: how long a copy may be used


def product_token(user_agent: str) -> str:
    """The name that robots.txt knows a crawler by: `fledge` of `fledge/1.0 (+https://example.org/bot)`."""
    match = re.match(r"[A-Za-z_-]+", user_agent)
    return match[0] if match else user_agent.split("/")[0].strip()


class Robots:
    """The rules of one origin for one crawler."""

    def __init__(self, text: str, token: str) -> None:
        try:
            from protego import Protego
        except ImportError:
            raise missing_extra("protego", "data") from None
        self._rules, self._token = Protego.parse(text), token

    @classmethod
    def of_bytes(cls, body: bytes, token: str) -> Robots:
        """From the file's bytes: UTF-8, with or without a byte order mark."""
        return cls(body[:MOST_BYTES].decode("utf-8-sig", "replace"), token)

    def allows(self, url: str) -> bool:
        """Whether the crawler may ask for a URL, however the reserved characters of its query are written (§2.2.2):
        `?u=https://x` and `?u=https%3A%2F%2Fx` are one to a rule, and forbidden if either is."""
        path, mark, query = url.partition("?")
        queries = dict.fromkeys((query, unquote(query), quote(unquote(query), safe="&=+*$!,;-._~")) if mark else ("",))
        return all(self._rules.can_fetch(f"{path}{mark}{query}", self._token) for query in queries)

    @property
    def delay(self) -> float:
        """Seconds between two requests, as `Crawl-delay` or `Request-rate` ask; 0 where neither stands there."""
        rate = self._rules.request_rate(self._token)
        return max(self._rules.crawl_delay(self._token) or 0.0, rate.seconds / rate.requests if rate else 0.0)

    @property
    def sitemaps(self) -> list[str]:
        """The sitemaps that the file names, in its order, each once."""
        return list(dict.fromkeys(self._rules.sitemaps))


class Marks(NamedTuple):
    """What a page asks for itself: not to be kept, and its links not to be followed."""

    refused: str = ""  # the word that forbids keeping it
    nofollow: bool = False


def marks_of(values: Iterable[str], headers: Sequence[tuple[str, str]], token: str, reserved: bool = False) -> Marks:
    """`values` of `<meta name="robots">` and of the crawler's own name, and the response's headers.

    `noindex` and `none` count, `noai` (a convention), and a text-and-data-mining reservation (`tdm-reservation: 1`,
    as header, or as meta with `reserved`).
    """
    words = [word for value in values for word in _words(value)]
    for name, value in headers:
        if name.lower() == "x-robots-tag":
            words += _header_words(value, token)
        elif name.lower() == "tdm-reservation" and value.strip() == "1":
            reserved = True
    refused = next((word for word in words if word in ("noindex", "none", "noai")), "")
    return Marks(refused or ("tdm-reservation" if reserved else ""), bool({"nofollow", "none"} & set(words)))


def _words(value: str) -> list[str]:
    return [word.strip().lower() for word in value.split(",")]


def _header_words(value: str, token: str) -> list[str]:
    """`X-Robots-Tag: noindex`, or `otherbot: noindex, nofollow`, which speaks to that robot alone."""
    name, colon, rest = value.partition(":")
    if colon and re.fullmatch(r"\s*[A-Za-z_-]+\s*", name) and name.strip().lower() != "unavailable_after":
        return _words(rest) if name.strip().lower() == token.lower() else []
    return _words(value)
