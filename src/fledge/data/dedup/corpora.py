"""The rows of this corpus behind those of the corpora that came before, and which row of a cluster stays.

The rule: a row of an earlier corpus before a new one; then the longest text; then the smallest 64-bit hash of the id
(ids would cost memory). It says nothing about the order in which rows arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

    from fledge.data.chunk import Chunk
    from fledge.data.steps.base import Sketches

Integers = NDArray[np.int64]
RANK = [("rank", "<u4"), ("name", "<u8"), ("row", "<i8")]
"""Fields by which records are sorted from the row that stays to those that go."""
_NEW, _LONGEST = np.uint32(2**31), 2**31 - 1


def rank_columns(chunk: Chunk) -> dict[str, pa.Array]:
    """The columns of a sketch by which `Corpora` ranks rows and names them: one line for each row of the chunk."""
    import pyarrow as pa

    from fledge.data.dedup.units import hash_each

    return {
        "row": pa.array(np.arange(len(chunk))),
        "length": pa.array(np.fromiter(map(len, chunk.texts), dtype=np.int64, count=len(chunk))),
        "name": pa.array(hash_each(chunk.ids)),
        "id": pa.array(chunk.ids, pa.string()),
    }


class Corpora:
    """Sketches of earlier corpora and of this one, their rows numbered through: the new ones from `first` on."""

    def __init__(self, sketches: Sketches, earlier: Sequence[Sketches]) -> None:
        self._all = [*earlier, sketches]
        self.scratch = sketches.scratch
        self.first = sum(corpus.rows for corpus in earlier)
        self.rows = self.first + sketches.rows

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """One table for each chunk of all corpora; `row` counts through."""
        start = 0
        for corpus in self._all:
            yield from corpus.tables(columns, start)
            start += corpus.rows

    def ranked(self, table: pa.Table, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Records with the fields of RANK filled from the columns row, length and name."""
        records = np.zeros(table.num_rows, dtype=dtype)
        row = table["row"].to_numpy()
        short = (_LONGEST - np.minimum(table["length"].to_numpy(), _LONGEST)).astype(np.uint32)
        records["rank"] = short + _NEW * (row >= self.first)
        records["name"], records["row"] = table["name"].to_numpy(), row
        return records

    def pick(self, rows: Integers, columns: list[str]) -> pa.Table:
        """The lines of these rows (sorted, each once, at least one)."""
        import pyarrow as pa

        return pa.concat_tables([table.take(pa.array(at)) for table, at in self.where(rows, columns)])

    def where(self, rows: Integers, columns: list[str]) -> Iterator[tuple[pa.Table, NDArray[np.intp]]]:
        """The tables that hold some of the rows (sorted, each once), and where in them."""
        for table in self.tables(["row", *columns]):
            own = table["row"].to_numpy()
            if not len(own):
                continue
            low, high = np.searchsorted(rows, (own[0], own[-1] + 1))
            if high > low:
                yield table, np.searchsorted(own, rows[low:high])

    def best_of(self, rows: Integers, labels: Integers) -> Integers:
        """(n,) for each row the one that stays of those with its label. `rows` sorted, each once."""
        if not len(rows):
            return rows
        records = self.ranked(self.pick(rows, ["length", "name"]), np.dtype(RANK))
        order = np.lexsort((records["row"], records["name"], records["rank"], labels))
        first = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0])
        best = np.empty(len(rows), dtype=np.int64)
        best[order] = np.repeat(rows[order[first]], np.diff(np.r_[first, len(rows)]))
        return best

    def verdicts(self, rows: Integers, best: Integers, reason: str) -> pa.Table:
        """New rows that are not the best of their cluster are refused, with the id of the one that stays."""
        import pyarrow as pa

        goes = (rows != best) & (rows >= self.first)
        order = np.argsort(rows[goes])
        rows, best = rows[goes][order], best[goes][order]
        if not len(rows):
            return pa.table({"row": rows, "reason": pa.array([], pa.string()), "value": pa.array([], pa.string())})
        named, at = np.unique(best, return_inverse=True)
        ids = self.pick(named, ["id"])["id"].combine_chunks()
        reasons = pa.array([reason, f"{reason} as in an earlier corpus"])
        return pa.table({
            "row": pa.array(rows - self.first),
            "reason": reasons.take(pa.array((best < self.first).astype(np.int64))),
            "value": ids.take(pa.array(at)),
        })  # fmt: skip


def unique_pairs(parts: Sequence[Integers]) -> Integers:
    """(m, 2) the pairs of all parts, sorted, each once."""
    pairs = np.concatenate([np.zeros((0, 2), dtype=np.int64), *parts])
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[np.diff(pairs, axis=0, prepend=-1).any(axis=1)]


def components(pairs: Integers) -> tuple[Integers, Integers]:
    """The rows that occur in `pairs` (m, 2), sorted, and for each a label: the same where a chain of pairs joins them.

    Labels fall until nothing changes: each to the least among its neighbours', then to its label's label.
    """
    rows, ends = np.unique(pairs, return_inverse=True)
    a, b = ends.reshape(-1, 2).T
    label = np.arange(len(rows))
    while True:
        least = np.minimum(label[a], label[b])
        before = label.copy()
        for end in (a, b):
            np.minimum.at(label, before[end], least)
            np.minimum.at(label, end, least)
        while (next_label := label[label]).tobytes() != label.tobytes():
            label = next_label
        if np.array_equal(label, before):
            return rows, label
