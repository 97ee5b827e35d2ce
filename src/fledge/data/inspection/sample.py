"""Some rows of a corpus, chosen by a hash of their id: the same ones wherever they stand and however it is read."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, Literal, TypeAlias, TypeVar

from fledge.data.language import language_of
from fledge.data.ngrams import hash64
from fledge.data.texts import text_of
from fledge.records.kinds import Labelled, Record
from fledge.records.shards import kind_in, read

By: TypeAlias = Literal["", "language", "label", "source"]
T = TypeVar("T")
FORMAT_OF_KIND = {
    "documents": "text",
    "conversations": "messages",
    "preferences": "ranking",
    "ratings": "rating",
    "labelled": "classification",
    "prompts": "prompt",
}
"""Kind of record → the format in which a sample of it is written where none is named."""


class Chosen(Generic[T]):
    """The `rows` items with the smallest hashes of seed and id among all that were added; memory holds no others.

    An item's fate does not depend on the order of the others. Items of one id are told apart by their place.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rows, self.seed = rows, seed
        self._heap: list[tuple[int, int, T]] = []
        self._place = 0

    def add(self, id: str, item: T) -> None:
        """Keep the item if its hash is small enough so far."""
        self._place += 1
        entry = (-hash64(f"{self.seed}\n{id}"), -self._place, item)  # a heap's top is the largest hash that is kept
        if len(self._heap) < self.rows:
            heapq.heappush(self._heap, entry)
        elif entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    @property
    def placed(self) -> list[tuple[int, T]]:
        """(place, item) in the order in which they came."""
        return sorted(((-place, item) for _, place, item in self._heap), key=lambda entry: entry[0])

    @property
    def items(self) -> list[T]:
        """The items in the order in which they came."""
        return [item for _, item in self.placed]


def sample(records: Iterable[Record], rows: int, seed: int = 0, by: By = "") -> list[Record]:
    """`rows` of the records, or so many of each language, label or source, in the order of the corpus."""
    groups: dict[str, Chosen[tuple[int, Record]]] = {}
    for place, record in enumerate(records):
        name = group_of(record, by)
        if name not in groups:
            groups[name] = Chosen(rows, seed)
        groups[name].add(record.id, (place, record))
    kept = [item for group in groups.values() for item in group.items]
    return [record for _, record in sorted(kept, key=lambda item: item[0])]


def sample_of(path: Path, rows: int, seed: int = 0, by: By = "") -> tuple[str, list[Record]]:
    """The kind of what lies at `path`, and a sample of it. Raises FledgeError where nothing there can be read."""
    kind = kind_in(path)
    return kind, sample(read(path, kind), rows, seed, by)


def group_of(record: Record, by: By) -> str:
    """What a record is sampled under: its language (found where it is not named), its label, its source."""
    if by == "language":
        return record.language or language_of(text_of(record)) or "und"
    if by == "label":
        return record.label if isinstance(record, Labelled) else record.meta.get("label", "")
    return record.source if by == "source" else ""
