"""How varied a corpus is: distinct texts and sources, vocabulary, repetition of words, how texts begin."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from fledge.data.ngrams import hash64
from fledge.data.texts import units
from fledge.records.kinds import Conversation, Record

WINDOW = 1_000
"""Units in a window of the type/token ratio."""
OPENING = {True: 4, False: 8}
"""Units of which an opening is made: words of ASCII text, characters and words of other text."""
_KEPT = 1 << 16
_COUNTED = 100_000


class Distinct:
    """How many different things were seen, in bounded memory: exact up to 65,536, then within about 0.4 %.

    Adaptive sampling (Wegman; Flajolet, 1990): only hashes below a threshold are kept, and it halves when they grow
    too many.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept, self._seen, self._shift = kept, set[int](), 0

    def add(self, thing: str) -> None:
        """See one thing, for the first time or again."""
        found = hash64(thing)
        if found >> (64 - self._shift):
            return
        self._seen.add(found)
        while len(self._seen) > self._kept:
            self._shift += 1
            self._seen = {h for h in self._seen if not h >> (64 - self._shift)}

    def __len__(self) -> int:
        return len(self._seen) << self._shift


@dataclass
class Words:
    """Of one language: units (words, or unspaced characters), different ones, and the type/token ratio.

    The ratio is the mean share of different units in consecutive windows of 1,000, so that corpora of different sizes
    compare (Johnson, 1944); None below one window.
    """

    units: int = 0
    vocabulary: int = 0
    type_token: float | None = None


@dataclass(frozen=True)
class Variety:
    """What `Gauge` found. `openings` are the most frequent first words, with how many texts begin so; `by_source` the
    most frequent sources."""

    texts: int
    sources: int
    words: dict[str, Words]
    openings: list[tuple[str, int]]
    by_source: list[tuple[str, int]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass
class _Language:
    seen: Distinct = field(default_factory=Distinct)
    units: int = 0
    window: list[str] = field(default_factory=list)
    windows: int = 0
    shares: float = 0.0


class Gauge:
    """Sees texts one by one, in bounded memory."""

    def __init__(self) -> None:
        self._texts, self._sources = Distinct(), Distinct()
        self._languages: dict[str, _Language] = {}
        self._openings: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()

    def add(self, record: Record, text: str, words: list[str], language: str) -> None:
        """One record, its whole text, the units of it, its language."""
        self._texts.add(text)
        if record.source:
            self._sources.add(record.source)
            self._rows = _counted(self._rows, record.source)
        of = self._languages.setdefault(language, _Language())
        of.units += len(words)
        for word in set(words):
            of.seen.add(word)
        of.window += words
        while len(of.window) >= WINDOW:
            of.shares += len(set(of.window[:WINDOW])) / WINDOW
            of.windows += 1
            del of.window[:WINDOW]
        if opening := opening_of(record, text):
            self._openings = _counted(self._openings, opening)

    def variety(self, most: int = 10) -> Variety:
        """What was seen so far; openings of one text only are left out."""
        words = {
            language: Words(of.units, len(of.seen), of.shares / of.windows if of.windows else None)
            for language, of in sorted(self._languages.items(), key=lambda item: -item[1].units)
        }
        frequent = [(opening, n) for opening, n in _ranked(self._openings, most) if n > 1]
        return Variety(len(self._texts), len(self._sources), words, frequent, _ranked(self._rows, most))


def _counted(counts: Counter[str], thing: str) -> Counter[str]:
    """With one more of it. Where there are too many, those seen once go: they are the least likely to be frequent."""
    counts[thing] += 1
    return Counter({t: n for t, n in counts.items() if n > 1}) if len(counts) > _COUNTED else counts


def _ranked(counts: Counter[str], most: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def opening_of(record: Record, text: str) -> str:
    """The first words of the text; of a conversation, of its first answer, where models repeat themselves most."""
    if isinstance(record, Conversation):
        text = next((m.content for m in record.messages if m.role == "assistant" and m.content), text)
    first = units(text[:200])
    spaced = "".join(first).isascii()
    return (" " if spaced else "").join(first[: OPENING[spaced]])
