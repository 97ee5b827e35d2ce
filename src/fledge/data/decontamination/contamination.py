"""Which evaluation items stand in training data, by shared n-grams (Brown et al., 2020, appendix C).

An item's question and answers are cut into n-grams of units (13 by default: words, or characters where words are not
spaced). Of a question shorter than n the whole is one gram where it has `shortest` units or more, and so is an item of
which no part is long enough. What many items share, or many documents hold, is boilerplate and proves nothing. An item
is dirty where a document holds evidence of it, and (with `least`) that evidence covers so much of the item's units:
any n-gram is GPT-3's rule, `least: 0.7` with `n: 8` PaLM's (Chowdhery et al., 2022).
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fledge.data.decontamination.eval_items import EvalItem
from fledge.data.judges.ngram_model import Stream
from fledge.data.ngrams import Words64, ngrams, unit_hashes
from fledge.data.texts import units

if TYPE_CHECKING:
    import pyarrow as pa

FEW = 10  # documents: what so many hold is never boilerplate, however small the corpus (GPT-3's bound)
_SIFT = 22  # bits of the sieve that spares most searches
_COMBINED = re.compile(r".[\u0300-\u036f\u3099\u309a]*", re.DOTALL)


@dataclass(frozen=True)
class Gram:
    """One n-gram of one item: it covers the item's units [at, at + length)."""

    item: int
    at: int
    length: int


class ItemIndex:
    """The n-grams of all items as sorted arrays, to look documents up in."""

    def __init__(self, items: Sequence[EvalItem], n: int = 13, shortest: int = 8, common_items: int = 5) -> None:
        self.items = list(items)
        self.sizes: list[int] = []  # units of each item
        runs = [(*run, number) for number, item in enumerate(self.items) for run in self._runs(item, n, shortest)]
        keys = np.concatenate([np.zeros(0, np.uint64), *(keys for keys, *_ in runs)])
        sizes = [len(keys) for keys, *_ in runs]
        at = np.concatenate([np.zeros(0, np.int64), *(np.arange(start, start + len(k)) for k, start, *_ in runs)])
        owners = np.repeat(np.array([owner for *_, owner in runs], np.int64), sizes)
        lengths = np.repeat(np.array([length for _, _, length, _ in runs], np.int64), sizes)
        order = np.lexsort((at, owners, keys))
        order = order[_rare(keys[order], owners[order], common_items)]
        self.keys, self.owners, self.at, self.lengths = keys[order], owners[order], at[order], lengths[order]
        self.checked = set(self.owners.tolist())
        """Items that leave a trace by which they could be found; others are too short, or all boilerplate."""
        self._by_length = {
            length: np.unique(self.keys[self.lengths == length]) for length in np.unique(self.lengths).tolist()
        }
        self._sieve = np.zeros(2**_SIFT, dtype=bool)
        self._sieve[self.keys >> np.uint64(64 - _SIFT)] = True

    def _runs(self, item: EvalItem, n: int, shortest: int) -> list[tuple[Words64, int, int]]:
        """(hashes, place of the first, length) of n-grams in a row. Parts lie one unit apart, so that no run of
        evidence crosses from one to another."""
        start, runs = 0, []
        parts = [units(text) for text in (*item.question, *item.answers)]
        for number, part in enumerate(parts):
            if len(part) >= n or (number < len(item.question) and len(part) >= shortest):
                length = min(n, len(part))
                runs.append((ngrams(unit_hashes(part), length), start, length))
            start += len(part) + 1
        whole = [unit for part in parts for unit in part]
        self.sizes.append(len(whole))
        if not runs and len(whole) >= shortest:
            length = min(n, len(whole))
            runs.append((ngrams(unit_hashes(whole), length), 0, length))
        return runs

    def hits(self, sequences: Sequence[Words64]) -> set[tuple[int, int]]:
        """(sequence, hash) wherever one of the items' n-grams stands."""
        stream = Stream.of(sequences, marks=False)
        of = np.repeat(np.arange(len(sequences)), stream.sizes)
        found: set[tuple[int, int]] = set()
        for length, keys in self._by_length.items():
            if length > len(stream.units):
                continue
            grams, there = stream.grams(length)
            ends = np.flatnonzero(there & self._sieve[grams >> np.uint64(64 - _SIFT)])
            at = np.minimum(np.searchsorted(keys, grams[ends]), len(keys) - 1)
            ends = ends[keys[at] == grams[ends]]
            found.update(zip(of[ends].tolist(), grams[ends].tolist(), strict=True))
        return found

    def look_up(self, sequences: Sequence[Words64]) -> Iterator[tuple[int, int, list[tuple[int, Gram]]]]:
        """(sequence, item, [(hash, gram)]) for every pair of a sequence and an item that share n-grams."""
        shared: dict[tuple[int, int], list[tuple[int, Gram]]] = defaultdict(list)
        for row, key in sorted(self.hits(sequences)):
            first, last = (int(np.searchsorted(self.keys, np.uint64(key), side)) for side in ("left", "right"))
            for i in range(first, last):
                gram = Gram(int(self.owners[i]), int(self.at[i]), int(self.lengths[i]))
                shared[row, gram.item].append((key, gram))
        for (row, item), some in sorted(shared.items()):
            yield row, item, some


def _rare(keys: Words64, owners: NDArray[np.int64], most: int) -> NDArray[np.bool_]:
    """Which entries (sorted by key, then owner) have a key that at most so many owners share."""
    if not len(keys):
        return np.zeros(0, dtype=bool)
    new_key = np.concatenate([[True], keys[1:] != keys[:-1]])
    new_owner = new_key | np.concatenate([[True], owners[1:] != owners[:-1]])
    number = np.cumsum(new_key) - 1
    return np.asarray((np.bincount(number, new_owner) <= most)[number])


# --- evidence ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """A document that holds an item: `share` of the item's units lie in shared n-grams, `longest` in one run."""

    row: int
    document: str
    task: str
    item: str
    share: float
    longest: int
    keys: tuple[int, ...]


def sketch(index: ItemIndex, words: Sequence[Sequence[str]], ids: Sequence[str]) -> pa.Table:
    """What a chunk shares with the items: a line for each pair of a row and an item."""
    import pyarrow as pa

    lines = []
    for row, number, some in index.look_up([unit_hashes(part) for part in words]):
        item = index.items[number]
        lines.append(
            {
                "row": row, "document": ids[row], "task": item.task, "item": item.id, "units": index.sizes[number],
                "key": [key for key, _ in some], "at": [g.at for _, g in some], "length": [g.length for _, g in some],
            }
        )  # fmt: skip
    columns = [
        ("row", pa.int64()), ("document", pa.string()), ("task", pa.string()), ("item", pa.string()),
        ("units", pa.int32()), ("key", pa.list_(pa.uint64())), ("at", pa.list_(pa.int32())),
        ("length", pa.list_(pa.int32())),
    ]  # fmt: skip
    return pa.Table.from_pylist(lines, schema=pa.schema(columns))


def matches(tables: Iterable[pa.Table], documents: int, common_documents: float, least: float) -> list[Match]:
    """The evidence in all sketches of a corpus of so many documents, in its order.

    An n-gram that more than a share `common_documents` of them hold (and more than 10) is boilerplate.
    """
    lines = [line for table in tables for line in table.to_pylist()]
    holders: dict[int, set[int]] = defaultdict(set)
    for line in lines:
        for key in line["key"]:
            holders[key].add(line["row"])
    most = max(FEW, common_documents * documents)
    found = []
    for line in lines:
        grams = [g for g in zip(line["key"], line["at"], line["length"], strict=True) if len(holders[g[0]]) <= most]
        if grams:
            covered, longest = _cover([(at, at + length) for _, at, length in grams])
            share = covered / max(1, line["units"])
            if share >= least:
                keys = tuple(sorted({key for key, _, _ in grams}))
                found.append(
                    Match(line["row"], line["document"], line["task"], line["item"], share, longest, keys)
                )  # fmt: skip
    return sorted(found, key=lambda match: (match.row, match.task, match.item))


def _cover(spans: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(how many units lie in any of the spans, how many in the longest run of them)."""
    merged = merge(spans)
    return sum(end - start for start, end in merged), max((end - start for start, end in merged), default=0)


def merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch or overlap made one, in order."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


# --- cutting -------------------------------------------------------------------------------------------------------


def spans_of(text: str, keys: Iterable[int], lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Where in a text (characters) n-grams with these hashes stand."""
    words, starts, ends = located(text)
    hashes, wanted = unit_hashes(words), np.sort(np.fromiter(keys, np.uint64))
    spans = []
    for length in lengths:
        for at in np.flatnonzero(np.isin(ngrams(hashes, length), wanted)).tolist():
            spans.append((starts[at], ends[at + length - 1]))
    return merge(spans)


def cut(text: str, spans: Sequence[tuple[int, int]], margin: int, shortest: int) -> list[str]:
    """What is left of a text without the spans and `margin` characters on both sides: pieces of `shortest` or more."""
    pieces, start = [], 0
    for first, last in [*merge((max(0, a - margin), min(len(text), b + margin)) for a, b in spans), (len(text), 0)]:
        pieces.append(text[start:first].strip())
        start = last
    return [piece for piece in pieces if len(piece) >= shortest]


def located(text: str) -> tuple[list[str], list[int], list[int]]:
    """`units(text)`, and where in the text each begins and ends: normalisation may change how long a character is."""
    plain: list[str] = []
    sources: list[tuple[int, int]] = []  # for every normalised character, where it comes from
    for match in _COMBINED.finditer(text):
        normal = unicodedata.normalize("NFKC", match[0]).casefold()
        plain.append(normal)
        sources += [match.span()] * len(normal)
    whole, at = "".join(plain), 0
    words, starts, ends = units(whole), [], []
    for word in words:
        at = max(at, whole.find(word, at))
        last = min(at + len(word), len(whole)) - 1
        starts.append(sources[min(at, last)][0])
        ends.append(sources[last][1])
        at = last + 1
    return words, starts, ends


# --- the report ----------------------------------------------------------------------------------------------------


@dataclass
class TaskFindings:
    """What was found of one task."""

    items: int = 0
    checked: int = 0
    dirty: dict[str, list[Match]] = field(default_factory=dict)  # by item


def by_task(index: ItemIndex, found: Sequence[Match]) -> dict[str, TaskFindings]:
    """Every task with its items and the evidence, the strongest first."""
    tasks: dict[str, TaskFindings] = {}
    for number, item in enumerate(index.items):
        task = tasks.setdefault(item.task, TaskFindings())
        task.items += 1
        task.checked += number in index.checked
    for match in found:
        tasks[match.task].dirty.setdefault(match.item, []).append(match)
    for task in tasks.values():
        task.dirty = {
            item: sorted(some, key=lambda m: (-m.share, -m.longest, m.row)) for item, some in sorted(task.dirty.items())
        }
    return dict(sorted(tasks.items()))


def as_json(
    tasks: dict[str, TaskFindings], shards: dict[str, dict[str, int]], settings: dict[str, Any]
) -> dict[str, Any]:
    """What `contamination.json` says; of each item the ten documents with the strongest evidence."""
    return {
        "settings": settings,
        "tasks": {
            name: {
                "items": task.items,
                "checked": task.checked,
                "contaminated": [
                    {
                        "id": item, "share": round(some[0].share, 4), "longest": max(m.longest for m in some),
                        "documents": [
                            {"id": m.document, "row": m.row, "share": round(m.share, 4), "longest": m.longest}
                            for m in some[:10]
                        ],
                        "documents_in_all": len(some),
                    }
                    for item, some in task.dirty.items()
                ],
            }
            for name, task in tasks.items()
        },
        "shards": shards,
    }  # fmt: skip
