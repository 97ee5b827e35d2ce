"""Splitting: whole records held out, and what training would already know of them taken out again.

1. Records (or groups of records that share a key of `meta`) are ordered by a seeded hash of their id, or by their date,
   the latest first; the first of each language (stratified: of each label in each language, its share) are held out.
   The order in which records arrive changes nothing.
2. A held-out record goes when a training record is nearly the same: Jaccard similarity of their 5-grams above one
   half, computed exactly. Units are words, or characters where words are not spaced.
3. Of a held-out document a paragraph (a line of 20 characters or more) goes when it stands word for word in training,
   or when more than half of its n-grams do (20 characters of Chinese, 8 words of English): versions of a law share
   articles. Shorter lines, headings mostly, stay. Other records go whole, by the same two measures.
4. More is held out until what is left reaches the target, which is at most a fifth of the language's bytes.

What goes is kept among the rejected; it is in neither part. A validation part is held out of what is then left, in the
same way. `folds.py` holds every record out once.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.data.arrangement import Arrangement, language_in, no_such_key
from fledge.data.ngrams import Words64, hash64, ngrams, places, shingles, union, unit_hashes
from fledge.data.texts import UNSPACED, size_of, text_of, units
from fledge.records.kinds import Document, Record, to_row
from fledge.records.rejects import Rejects
from fledge.records.shards import ShardWriter

SIMILAR = 0.5  # Jaccard similarity of 5-grams
KNOWN = 0.5  # share of n-grams
PARAGRAPH = 20  # characters
GRAM_SIZES = (20, 8)  # units, of unspaced and of spaced scripts
LARGEST_SHARE = 0.2
IN_MEMORY = 64_000_000  # bytes of text that are kept rather than read again for each pass
KEYS_TOLD = 50  # keys of meta that are remembered, to name them where one is missing
_STEP = "split"
_UNSPACED_RUN = re.compile(f"[{UNSPACED}]+")


class Piece:
    """A paragraph of a document, or a whole record of another kind: what stays or goes as one."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.hashes = unit_hashes(units(text))
        self.characters = sum(map(len, _UNSPACED_RUN.findall(text)))  # how many units are single characters

    @property
    def key(self) -> int:
        """A hash of the whole sequence of units."""
        return int.from_bytes(blake2b(self.hashes.tobytes(), digest_size=8).digest(), "little")

    @property
    def grams(self) -> Words64:
        """The sorted set of n-grams, longer ones where most units are single characters."""
        return shingles(self.hashes, GRAM_SIZES[2 * self.characters < len(self.hashes)])


def pieces_of(record: Record) -> list[Piece]:
    """The record's parts that can go by themselves."""
    parts = record.text.split("\n") if isinstance(record, Document) else [text_of(record)]
    return [Piece(part) for part in parts]


@dataclass
class Candidate:
    """A record that may be held out, with what is compared."""

    record: Record
    group: str
    pieces: list[Piece]
    size: int
    shingles: Words64  # sorted set of 5-grams of the whole record

    @classmethod
    def of(cls, record: Record, group: str) -> Candidate:
        pieces = pieces_of(record)
        whole = np.concatenate([piece.hashes for piece in pieces])
        return cls(record, group, pieces, size_of(record), shingles(whole, 5))


@dataclass
class Seen:
    """What training holds of the candidates: marks on their paragraphs' keys and n-grams, and each one's nearest."""

    keys: NDArray[np.bool_]
    grams: NDArray[np.bool_]
    nearest: NDArray[np.float64]  # Jaccard similarity

    def copy(self) -> Seen:
        return Seen(self.keys.copy(), self.grams.copy(), self.nearest.copy())


class Index:
    """The candidates' paragraphs, n-grams and shingles as sorted arrays, to look training records up in."""

    def __init__(self, candidates: list[Candidate]) -> None:
        self.keys = np.unique(np.array([piece.key for c in candidates for piece in c.pieces], dtype=np.uint64))
        self.grams = union(piece.grams for c in candidates for piece in c.pieces)
        values = np.concatenate([c.shingles for c in candidates] or [np.zeros(0, np.uint64)])
        order = np.argsort(values, kind="stable")
        self.shingles, starts = np.unique(values[order], return_index=True)
        self.starts = np.append(starts, len(values))
        self.owners = np.repeat(np.arange(len(candidates)), [len(c.shingles) for c in candidates])[order]
        self.sizes = np.array([len(c.shingles) for c in candidates], dtype=np.int64)

    def nothing_seen(self) -> Seen:
        return Seen(np.zeros(len(self.keys), bool), np.zeros(len(self.grams), bool), np.zeros(len(self.sizes)))

    def see(self, record: Record, seen: Seen) -> None:
        """Mark what a training record shares with the candidates."""
        pieces = pieces_of(record)
        whole = np.concatenate([piece.hashes for piece in pieces])
        keys = np.array([piece.key for piece in pieces if len(piece.text) >= PARAGRAPH], dtype=np.uint64)
        seen.keys[places(self.keys, keys)] = True
        characters = sum(piece.characters for piece in pieces)
        for n, present in zip(GRAM_SIZES, (characters > 0, characters < len(whole)), strict=True):
            if present:
                seen.grams[places(self.grams, ngrams(whole, n))] = True
        np.maximum(seen.nearest, self.similarity(shingles(whole, 5)), out=seen.nearest)

    def similarity(self, other: Words64) -> NDArray[np.float64]:
        """(candidates,) Jaccard similarity of each with a sorted set of shingles."""
        at = places(self.shingles, other).tolist()
        owners = [self.owners[self.starts[i] : self.starts[i + 1]] for i in at]
        shared = np.bincount(np.concatenate(owners), minlength=len(self.sizes)) if owners else np.zeros(len(self.sizes))
        return np.asarray(shared / np.maximum(self.sizes + len(other) - shared, 1), dtype=np.float64)

    def clean(self, candidate: Candidate, number: int, seen: Seen) -> Cleaned:
        """What is left of a candidate beside the training records seen."""
        if seen.nearest[number] > SIMILAR:
            return Cleaned(
                None, [("nearly the same as a training record", f"{seen.nearest[number]:.2f}", candidate.record)]
            )
        cleaned = Cleaned(candidate.record, [])
        kept = []
        for piece in candidate.pieces:
            reason, value = self._known(piece, seen)
            if reason:
                text = piece.text if isinstance(candidate.record, Document) else candidate.record
                cleaned.gone.append((reason, value, text))
            else:
                kept.append(piece.text)
        if cleaned.gone and isinstance(candidate.record, Document) and any(units(text) for text in kept):
            cleaned.record = replace(candidate.record, text="\n".join(kept))
        elif cleaned.gone:
            cleaned.record = None
        return cleaned

    def _known(self, piece: Piece, seen: Seen) -> tuple[str, str]:
        if len(piece.text) < PARAGRAPH:
            return "", ""
        if seen.keys[np.searchsorted(self.keys, np.uint64(piece.key))]:
            return "stands in training", ""
        grams = piece.grams
        share = float(seen.grams[np.searchsorted(self.grams, grams)].mean()) if len(grams) else 0.0
        return ("mostly stands in training", f"{share:.2f}") if share > KNOWN else ("", "")


@dataclass
class Cleaned:
    """What is left of a candidate (None: nothing), and what went: (reason, value, a paragraph or the record)."""

    record: Record | None
    gone: list[tuple[str, str, str | Record]]


@dataclass
class Choice:
    """What is held out in the end."""

    groups: set[str] = field(default_factory=set)
    cleaned: list[tuple[Candidate, Cleaned]] = field(default_factory=list)
    size: Counter[str] = field(default_factory=Counter)  # by language, after cleaning


class Splitter:
    """`records()` reads the same records in the same order each time.

    `held_out` is the bytes of text wanted of each language; `progress` hears of rows done and rows in all. Raises
    FledgeError where no record has a key that the arrangement asks for.
    """

    def __init__(
        self,
        records: Callable[[], Iterable[Record]],
        held_out: int,
        arrangement: Arrangement,
        seed: int,
        progress: Callable[[float, float | None], None] = lambda done, total: None,
    ) -> None:
        self.read, self.arrangement, self.seed, self.progress = records, arrangement, seed, progress
        self.rows = total = self.undated = 0
        self.kept: list[Record] | None = []
        sizes: dict[str, Counter[str]] = defaultdict(Counter)  # group → stratum → bytes
        dates: dict[str, str] = {}  # group → its latest date
        missing: set[str] | None = None
        keys: set[str] = set()
        for record in records():
            size, group = size_of(record), self._group(record)
            sizes[group][arrangement.stratum(record)] += size
            dates[group] = max(dates.get(group, ""), date := arrangement.date(record))
            lacks = arrangement.missing_from(record)
            missing = lacks if missing is None else missing & lacks
            keys |= set(record.meta) if lacks and len(keys) < KEYS_TOLD else set()
            self.undated += bool(arrangement.time) and not date
            self.rows, total = self.rows + 1, total + size
            progress(self.rows, None)
            if self.kept is not None:
                self.kept.append(record)
            if total > IN_MEMORY:
                self.kept = None
        if missing or (arrangement.time and self.rows and not any(dates.values())):
            raise no_such_key(arrangement, missing or set(), keys)
        self.dates = dates
        self.size = {group: strata.total() for group, strata in sizes.items()}
        self.order: dict[str, list[str]] = defaultdict(list)  # stratum → its groups in the order in which they go
        for group in self._in_order(sizes):
            strata = sizes[group]
            self.order[max(sorted(strata), key=lambda stratum: strata[stratum])].append(group)
        self.total = {stratum: sum(self.size[g] for g in groups) for stratum, groups in sorted(self.order.items())}
        languages = Counter[str]()
        for stratum, size in self.total.items():
            languages[stratum.partition("/")[0]] += size
        self.target = {
            stratum: min(
                int(held_out * size / languages[stratum.partition("/")[0]]) if arrangement.stratify else held_out,
                int(LARGEST_SHARE * size),
            )
            for stratum, size in self.total.items()
        }

    def _in_order(self, groups: Iterable[str]) -> list[str]:
        """The groups that may be held out, the first first: by a hash, or from the latest date backwards."""
        found = sorted(groups, key=lambda group: (hash64(f"{self.seed}:{group}"), group))
        if not self.arrangement.time:
            return found
        dated = (group for group in found if self.dates[group])
        return sorted(dated, key=lambda group: self.dates[group], reverse=True)

    def records(self) -> Iterator[Record]:
        """All records once more, in the same order."""
        for number, record in enumerate(self.read() if self.kept is None else self.kept, start=1):
            self.progress(number, self.rows)
            yield record

    def _group(self, record: Record) -> str:
        return self.arrangement.group(record)

    def choose(self) -> Choice:
        """Hold out the fewest groups, in their order, of which enough is left. One pass over the records for a try."""
        reach = 2.0
        while True:
            candidates = self._candidates(reach)
            everyone = [c for language in sorted(candidates) for c in candidates[language]]
            groups, index = {c.group for c in everyone}, Index(everyone)
            seen = index.nothing_seen()
            for record in self.records():
                if self._group(record) not in groups:
                    index.see(record, seen)
            choice = self._fewest(candidates, index, seen)
            short = [language for language in candidates if choice.size[language] < self.target[language]]
            if not any(reach * self.target[language] < self.total[language] / 2 for language in short):
                return choice
            reach *= 2

    def _candidates(self, reach: float) -> dict[str, list[Candidate]]:
        """By language, the first groups' records: `reach` times the target, but half of the language at most."""
        places: dict[str, tuple[str, int]] = {}
        for language, groups in self.order.items():
            wanted, total = min(reach * self.target[language], self.total[language] / 2), 0
            for i, group in enumerate(groups[:-1]):
                if total >= wanted:
                    break
                places[group] = (language, i)
                total += self.size[group]
        found: dict[str, list[tuple[int, str, Candidate]]] = defaultdict(list)
        for record in self.records():
            if (group := self._group(record)) in places:
                language, i = places[group]
                found[language].append((i, record.id, Candidate.of(record, group)))
        return {
            language: [c for *_, c in sorted(items, key=lambda item: item[:2])] for language, items in found.items()
        }

    def _fewest(self, candidates: dict[str, list[Candidate]], index: Index, outside: Seen) -> Choice:
        """Lengthen each language's part until enough is left of it; candidates behind it count as training."""
        counts = {language: _first(items, self.target[language]) for language, items in candidates.items()}
        while True:
            seen = outside.copy()
            for language, items in candidates.items():
                for candidate in items[counts[language] :]:
                    index.see(candidate.record, seen)
            choice, number = Choice(), 0
            for language, items in sorted(candidates.items()):
                for i, candidate in enumerate(items[: counts[language]]):
                    cleaned = index.clean(candidate, number + i, seen)
                    choice.groups.add(candidate.group)
                    choice.cleaned.append((candidate, cleaned))
                    choice.size[language] += size_of(cleaned.record) if cleaned.record else 0
                number += len(items)
            grown = False
            for language, items in candidates.items():
                missing = self.target[language] - choice.size[language]
                if missing > 0 and counts[language] < len(items):
                    counts[language] += _first(items[counts[language] :], missing)
                    grown = True
            if not grown:
                return choice

    def write(self, kind: str, train: Path, held_out: Path) -> dict[str, Any]:
        """Write both parts, and below `held_out/rejected` what was taken out. Returns the metrics."""
        choice = self.choose()
        kept = (record for record in self.records() if self._group(record) not in choice.groups)
        return {
            **write_part(kind, train, kept, "train"),
            **write_cleaned(kind, held_out, choice.cleaned, "held_out"),
            "held_out_target": self.target, **self.undated_rows(),
        }  # fmt: skip

    def write_three(self, kind: str, train: Path, validation: Path, held_out: Path, size: int) -> dict[str, Any]:
        """The same with a validation part of `size` bytes of each language, held out of what is left."""
        choice = self.choose()

        def rest() -> Iterator[Record]:
            return (record for record in self.records() if self._group(record) not in choice.groups)

        second = Splitter(rest, size, self.arrangement, self.seed, self.progress)
        chosen = second.choose()
        kept = (record for record in second.records() if self._group(record) not in chosen.groups)
        return {
            **write_part(kind, train, kept, "train"),
            **write_cleaned(kind, validation, chosen.cleaned, "validation"),
            **write_cleaned(kind, held_out, choice.cleaned, "held_out"),
            "held_out_target": self.target, "validation_target": second.target, **self.undated_rows(),
        }  # fmt: skip

    def undated_rows(self) -> dict[str, int]:
        """How many records have no date, where one is asked for."""
        return {"undated_rows": self.undated} if self.undated else {}


def write_part(kind: str, folder: Path, records: Iterable[Record], name: str) -> dict[str, Any]:
    """Write records as they are; how many rows and bytes there are of each language."""
    rows, size = Counter[str](), Counter[str]()
    with ShardWriter(folder, kind) as writer:
        for record in records:
            writer.write(record)
            rows[language_in(record)] += 1
            size[language_in(record)] += size_of(record)
    return {f"{name}_rows": dict(sorted(rows.items())), f"{name}_bytes": dict(sorted(size.items()))}


def write_cleaned(kind: str, folder: Path, cleaned: Sequence[tuple[Candidate, Cleaned]], name: str) -> dict[str, Any]:
    """Write what is left of held-out records, and below `rejected` what was taken out of them."""
    with Rejects(folder) as rejects:
        for candidate, found in cleaned:
            for reason, value, what in found.gone:
                row = what if isinstance(what, str) else json.dumps(to_row(what), ensure_ascii=False)
                rejects.add(_STEP, reason, value, row, candidate.record.id)
        removed = rejects.reasons.get(_STEP, {})
    metrics = write_part(kind, folder, (found.record for _, found in cleaned if found.record is not None), name)
    gone = sum(candidate.size for candidate, _ in cleaned) - sum(metrics[f"{name}_bytes"].values())
    prefix = "" if name == "held_out" else f"{name}_"
    return {**metrics, f"{prefix}removed": removed, f"{prefix}removed_bytes": gone}


def _first(items: list[Candidate], size: int) -> int:
    """How many of the first candidates have `size` bytes together, groups left whole."""
    total = 0
    for i, item in enumerate(items):
        if total >= size and (i == 0 or items[i - 1].group != item.group):
            return i
        total += item.size
    return len(items)
