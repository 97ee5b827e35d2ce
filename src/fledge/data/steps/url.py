"""Addresses: pages from blocked places go before anything else is asked of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from pydantic import Field, PrivateAttr

from fledge.core.reference import Source
from fledge.data.chunk import Chunk
from fledge.data.steps.base import Find, Refused, Rejected, Step

_WORD = re.compile(r"[^\W_]+")


class URL(Step, name="url"):
    """Refuses rows by the address they came from: blocked hosts with all below them, blocked words, words of which two
    are too many, parts of words: the first step of FineWeb (Penedo et al., 2024, section 3.1). The address is `url` in
    `meta`, else the source; a row without one passes. Lists are yours: fledge ships none."""

    domains: tuple[str, ...] = Field((), description="blocked hosts; what is below them is blocked with them")
    domain_list: Source | None = Field(None, description="a file of such hosts, one a line; # begins a comment")
    words: tuple[str, ...] = Field((), description="words that no address may hold")
    word_list: Source | None = Field(None, description="a file of such words, one a line")
    soft_words: tuple[str, ...] = Field((), description="words of which an address may hold fewer than soft_limit")
    soft_limit: int = Field(2, ge=1, description="so many different soft words are too many")
    parts: tuple[str, ...] = Field((), description="parts of words that no address may hold, as Chinese words are")
    _domains: frozenset[str] = PrivateAttr(default=frozenset())
    _words: frozenset[str] = PrivateAttr(default=frozenset())

    def start(self, find: Find) -> None:
        listed = [[] if source is None else list(_lines(source, find)) for source in (self.domain_list, self.word_list)]
        self._domains = frozenset(map(_ascii, (*self.domains, *listed[0])))
        self._words = frozenset(word.casefold() for word in (*self.words, *listed[1]))

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        refused: Refused = {}
        for row, url in enumerate(urls(chunk)):
            if not url:
                counts["url/without address"] += 1
            elif (verdict := self._verdict(url)) is not None:
                refused[row] = verdict
        return chunk, refused

    def _verdict(self, url: str) -> Rejected | None:
        try:
            host = _ascii(urlsplit(url).hostname or "")
        except ValueError:
            return Rejected("address that cannot be read", url[:80])
        names = host.split(".")
        for at in range(len(names)):
            if (above := ".".join(names[at:])) in self._domains:
                return Rejected("blocked domain", above)
        plain = unquote(url).casefold()
        found = set(_WORD.findall(plain))
        if hard := found & self._words:
            return Rejected("blocked word in the address", min(hard))
        soft = sorted(word for word in self.soft_words if word.casefold() in found)
        if len(soft) >= self.soft_limit:
            return Rejected("several soft words in the address", " ".join(soft))
        for part in self.parts:
            if part.casefold() in plain:
                return Rejected("blocked part of the address", part)
        return None


def urls(chunk: Chunk) -> list[str]:
    """Where each row came from, "" where nothing says."""
    metas, sources = chunk.rows["meta"].to_pylist(), chunk.rows["source"].to_pylist()
    found = []
    for meta, source in zip(metas, sources, strict=True):
        named = next((entry["value"] for entry in meta or [] if entry["key"] == "url"), "")
        found.append(named or (source if source.startswith(("http://", "https://")) else ""))
    return found


def _lines(source: Source, find: Find) -> Iterable[str]:
    for file in find(source):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line := line.split("#")[0].strip():
                yield line.split()[-1]  # a line of a hosts file is "0.0.0.0 name"


def _ascii(host: str) -> str:
    """A host's name as DNS knows it; one that is no valid name as it came."""
    host = host.casefold().strip(".")
    try:
        return host if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:
        return host
