"""Canonical URLs: one spelling for what is one page (RFC 3986 §6.2, the WHATWG's URL standard where they differ).

    canonical("../b?utm_source=x#top", base="HTTP://Example.ORG:80/a/c") == "http://example.org/b"

Left alone on purpose: double slashes, a trailing slash, the order of the query (unless asked), upper case in a path;
servers do tell these apart.
"""

from __future__ import annotations

import codecs
import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

_PORTS = {"http": 80, "https": 443}
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_KEPT = _UNRESERVED | frozenset(b":/?#[]@!$&'()*+,;=%")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_LONE_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_BLANKS = re.compile(r"[\t\n\r]")  # dropped anywhere in a URL, as browsers do
_DOT = re.compile(r"%2e", re.IGNORECASE)
_RELATIVE = re.compile(r"(?![A-Za-z][A-Za-z0-9+.-]*:)")

_TRACKING = re.compile(
    r"utm_\w+|[gdwyft]?clid|fbclid|gclsrc|gbraid|wbraid|msclkid|twclid|ttclid|igshid|li_fat_id|mc_[ce]id|_g[al]|_hs\w+"
    r"|hsctatracking|mkt_tok|oly_\w+_id|vero_\w+|ref_src|wt\.mc_\w+|(?:pk|mtm)_(?:campaign|kwd|keyword|source|medium|content|cid|group|placement)|s_cid|cmpid"
    r"|spm|scm|spm_id_from|vd_source|bd_vid|hm(?:sr|pl|cu|kw|ci)|share_(?:source|medium|plat|tag|session_id)",
    re.IGNORECASE,
)
_SESSION = re.compile(r"(?:php|asp|cf|j)?sess(?:ion)?_?id\w*|aspsessionid\w+|cfid|cftoken|oscsid|zenid", re.IGNORECASE)
_SESSION_IN_PATH = re.compile(r";(?:jsessionid|phpsessid|sessionid)=[^/;?]*|/\([AFS]\([^()/]*\)\)(?=/)", re.IGNORECASE)


class BadURL(ValueError):
    """Not the address of a page on the web; the text says why."""


class NotHTTP(BadURL):
    """Another scheme: mailto, javascript, ftp. Such links are no pages and are passed over."""


class Place(NamedTuple):
    """The parts of a canonical URL that a request needs."""

    scheme: str
    host: str
    port: int
    target: str  # path and query

    @property
    def origin(self) -> str:
        """`https://example.org`, the port only where it is not the usual one: what a robots.txt speaks for."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == _PORTS[self.scheme] else f":{self.port}")


def canonical(
    url: str, base: str | None = None, *, sort_query: bool = False, keep_tracking: bool = False, encoding: str = "utf-8"
) -> str:
    """The one spelling of `url`, resolved against `base`. Raises `BadURL` with the reason where there is none.

    Lower-case scheme and host (IDNA in its ASCII form), no default port, no dot segments, no fragment, escapes only
    where needed and in upper case, no tracking parameters and no session ids. `encoding` is that of the page in which
    the link stood: browsers write the *query* in it, the path always in UTF-8.
    """
    text = _BLANKS.sub("", url.strip("".join(map(chr, range(33))) + "\u3000")).partition("#")[0]
    if _RELATIVE.match(text) or text[:4].lower() == "http":
        text = _slashes(text)
    try:
        text = urljoin(base, text) if base is not None else text
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise BadURL(f"not a URL: {error}") from None
    scheme = parts.scheme.lower()
    if scheme not in _PORTS:
        raise NotHTTP(f"not http or https: {scheme or 'no scheme'}")
    if parts.username is not None:
        raise BadURL("it carries a user name")
    path = _path(_SESSION_IN_PATH.sub("", parts.path))
    query = _query(parts.query, sort_query, keep_tracking, encoding)
    place = Place(scheme, _host(parts.hostname or ""), port or _PORTS[scheme], path + query)
    return place.origin + place.target


def split(url: str) -> Place:
    """The parts of a canonical URL."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme], target)


def _slashes(text: str) -> str:
    """Backslashes before the query count as slashes, as browsers have it."""
    path, mark, query = text.partition("?")
    return path.replace("\\", "/") + mark + query


def _host(host: str) -> str:
    host = unquote(host).rstrip(".").lower()
    if ":" in host:
        try:
            return str(ipaddress.IPv6Address(host.partition("%")[0]))
        except ValueError:
            raise BadURL(f"not a host: {host}") from None
    if not host.isascii():
        import idna

        try:
            host = idna.encode(host, uts46=True).decode()
        except (idna.IDNAError, UnicodeError) as error:
            raise BadURL(f"not a host: {error}") from None
    if not re.fullmatch(r"(?!\.)[a-z0-9._-]{1,253}", host) or ".." in host:
        raise BadURL(f"not a host: {host}" if host else "it names no host")
    return host


def _reference(error: UnicodeError) -> tuple[str, int]:
    """A character that the page's encoding does not have, as browsers send it: `&#N;`, escaped (WHATWG URL, §5.2)."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(f"%26%23{ord(character)}%3B" for character in found), error.end


codecs.register_error("fledge.url", _reference)


def _escaped(text: str, encoding: str = "utf-8") -> str:
    """Escapes of unreserved characters undone, the rest in upper case; what may not stand in a URL escaped."""
    raw = _LONE_PERCENT.sub(b"%25", text.encode(encoding, "fledge.url" if encoding != "utf-8" else "replace"))

    def undo(match: re.Match[bytes]) -> bytes:
        value = int(match[1], 16)
        return bytes([value]) if value in _UNRESERVED else match[0].upper()

    raw = _ESCAPE.sub(undo, raw)
    return "".join(chr(byte) if byte in _KEPT else f"%{byte:02X}" for byte in raw)


def _path(path: str) -> str:
    """Without dot segments (RFC 3986 §5.2.4), `%2e` counting as a dot."""
    kept: list[str] = []
    segments = _DOT.sub(".", path).split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1:] in ([".."], ["."]):
        kept.append("")
    return "/" + _escaped("/".join(kept))


def _query(query: str, ordered: bool, keep_tracking: bool, encoding: str) -> str:
    items = [item for item in query.split("&") if item]
    if not keep_tracking:
        items = [item for item in items if not _is_noise(unquote(item.partition("=")[0]))]
    items = [_escaped(item, encoding) for item in items]
    if ordered:
        items.sort()
    return f"?{'&'.join(items)}" if items else ""


def _is_noise(key: str) -> bool:
    return bool(_TRACKING.fullmatch(key) or _SESSION.fullmatch(key))


_NUMBERS = re.compile(r"\d+")
_HEX = re.compile(r"(?<![0-9a-z])(?=[a-f]*\d)[0-9a-f]{8,}(?![0-9a-z])", re.IGNORECASE)


def patterns(url: str) -> Iterator[str]:
    """The shapes a URL belongs to, numbers and long hexadecimal ids left open: what a trap makes without end.

    `/calendar/2026/11?view=day` → `…/calendar/N/N?view`, and `…/calendar/N/N?*` for every query of that path.
    """
    parts = urlsplit(url)
    path = _NUMBERS.sub("N", _HEX.sub("H", parts.path))
    if not parts.query:
        yield f"{parts.netloc}{path}"
        return
    keys = sorted({_NUMBERS.sub("N", item.partition("=")[0]) for item in parts.query.split("&")})
    yield f"{parts.netloc}{path}?{'&'.join(keys)}"
    yield f"{parts.netloc}{path}?*"


def repeats(url: str) -> str:
    """The part of the path that repeats like a relative link gone wrong (`/a/b/a/b/a/b`, or one name four times);
    empty where none does."""
    segments = [segment for segment in urlsplit(url).path.split("/") if segment]
    for segment in segments:
        if segments.count(segment) >= 4 and not segment.isdigit():
            return segment
    for length in range(1, len(segments) // 3 + 1):
        for start in range(len(segments) - 3 * length + 1):
            block = segments[start : start + length]
            if segments[start : start + 3 * length] == block * 3 and not "".join(block).isdigit():
                return "/".join(block)
    return ""
