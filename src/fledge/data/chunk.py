"""A chunk: up to some thousand rows of one kind as an Arrow table, what a step of the refinery works on.

What is computed about a text (its words, say) is computed once and shared by the steps that follow, until a step
changes the texts:

    words = chunk.of_each(units)         # [units(text) for text in chunk.texts], remembered
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from fledge.data.texts import map_texts, text_of
from fledge.records.kinds import Record, from_row, schema, to_row

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


class Chunk:
    """Rows of one `kind`. Immutable: every change is another chunk."""

    def __init__(self, kind: str, rows: pa.Table, known: dict[Any, list[Any]] | None = None) -> None:
        self.kind, self.rows = kind, rows
        self._known = known or {}

    @classmethod
    def of(cls, kind: str, records: Iterable[Record]) -> Chunk:
        """The records, all of one kind, as a chunk."""
        import pyarrow as pa

        return cls(kind, pa.Table.from_pylist([to_row(record) for record in records], schema=schema(kind)))

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @cached_property
    def texts(self) -> list[str]:
        """One text for each row: all that people or models wrote in it, with line breaks between."""
        if self._plain:
            return self.rows["text"].to_pylist()  # type: ignore[no-any-return]
        return self.of_each_record(text_of)

    @cached_property
    def languages(self) -> list[str]:
        """ISO 639-1 codes, "" where unknown."""
        return self.rows["language"].to_pylist()  # type: ignore[no-any-return]

    @cached_property
    def ids(self) -> list[str]:
        """The rows' ids."""
        return self.rows["id"].to_pylist()  # type: ignore[no-any-return]

    @cached_property
    def records(self) -> list[Record]:
        """The rows as records: convenient, and several times slower than columns."""
        return [from_row(self.kind, row) for row in self.rows.to_pylist()]

    def of_each(self, measure: Callable[[str], T]) -> list[T]:
        """`measure` of every text, computed once for all steps that ask for it (so `measure` must be pure)."""
        if measure not in self._known:
            self._known[measure] = [measure(text) for text in self.texts]
        return self._known[measure]

    def of_each_record(self, measure: Callable[[Record], T]) -> list[T]:
        """`measure` of every record."""
        return [measure(record) for record in self.records]

    def take(self, rows: Sequence[int]) -> Chunk:
        """The rows at these positions, with what is known about them."""
        if len(rows) == len(self):
            return self
        import pyarrow as pa

        known = {measure: [values[i] for i in rows] for measure, values in self._known.items()}
        return Chunk(self.kind, self.rows.take(pa.array(rows, pa.int64())), known)

    def map_texts(self, change: Callable[[str, str], str], everywhere: bool = False) -> Chunk:
        """`change(text, language)` in place of each text of each row; the same chunk where nothing changed.

        With `everywhere` also in `meta`, names, labels and tool calls (see `texts.map_texts`).
        """
        if self._plain and not (everywhere and (self._has_meta or self.kind != "documents")):
            texts = [change(*pair) for pair in zip(self.texts, self.languages, strict=True)]
            return self if texts == self.texts else self.with_column("text", texts)
        before = self.records
        after = [map_texts(record, lambda text, of=record.language: change(text, of), everywhere) for record in before]  # type: ignore[misc]
        if all(a is b for a, b in zip(after, before, strict=True)):
            return self
        return Chunk.of(self.kind, after)

    def with_column(self, name: str, values: Sequence[Any]) -> Chunk:
        """Another column in place of `name`. What is known about the texts stays unless the texts change."""
        import pyarrow as pa

        at = self.rows.schema.get_field_index(name)
        column = pa.array(values, type=self.rows.schema.field(at).type)
        rows = self.rows.set_column(at, self.rows.schema.field(at), column)
        return Chunk(self.kind, rows, self._known if name in ("language", "source", "id", "meta") else None)

    def with_meta(self, key: str, values: Sequence[str]) -> Chunk:
        """`key` added to every row's `meta` (or replaced there): scores and labels for later stages."""
        meta = [
            sorted([*(m for m in old or [] if m["key"] != key), {"key": key, "value": value}], key=lambda m: m["key"])
            for old, value in zip(self.rows["meta"].to_pylist(), values, strict=True)
        ]
        return self.with_column("meta", meta)

    @property
    def _plain(self) -> bool:
        """Whether a row's whole text is its column `text`."""
        return self.kind in ("documents", "labelled")

    @property
    def _has_meta(self) -> bool:
        return any(self.rows["meta"].to_pylist())
