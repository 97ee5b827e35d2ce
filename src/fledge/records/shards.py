"""Records on disk: Parquet shards written and read as a stream, the same input giving the same bytes.

    with ShardWriter(job.out, "documents") as out:
        for document in read(job.open(self.data), "documents"):
            out.write(document)

A folder of shards is `records/part-00000.parquet` and so on. `datasets.load_dataset("parquet", data_files=…)` and
polars read the files as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError
from fledge.core.language import t
from fledge.records.kinds import KINDS, Conversation, Record, as_document, from_row, schema, to_row

if TYPE_CHECKING:
    import pyarrow as pa

    from fledge.records.rejects import Rejects

RECORDS = "records"
_GROUP_ROWS, _GROUP_CHARACTERS = 2_000, 16_000_000  # a row group ends at whichever comes first


class Parts:
    """Rows of any schema into `folder/part-00000.parquet`, `part-00001.parquet`, …; memory holds one row group."""

    def __init__(self, folder: Path, columns: pa.Schema, rows_per_part: int) -> None:
        self.folder, self.columns, self.rows_per_part = folder, columns, rows_per_part
        self.rows = 0
        self._part = 0
        self._in_part = 0
        self._group: list[dict[str, Any]] = []
        self._characters = 0
        self._tables: list[pa.Table] = []
        self._file: Any = None

    def add(self, row: dict[str, Any], characters: int) -> None:
        """Append one row; `characters` is about how much text it holds."""
        self._group.append(row)
        self.rows += 1
        self._characters += characters
        full = self._in_part + len(self._group) >= self.rows_per_part
        if full or len(self._group) >= _GROUP_ROWS or self._characters >= _GROUP_CHARACTERS:
            self._flush()
        if full:
            self._end_part()

    def add_table(self, table: pa.Table) -> None:
        """Append rows that are a table already. Row groups and parts end where they would end row by row, but for
        groups of long texts, which end at the next table's end."""
        if self._group:
            self._flush()
        self._tables.append(table.select(self.columns.names).cast(self.columns))
        self.rows += table.num_rows
        self._flush_tables(all_of_them=sum(t.nbytes for t in self._tables) >= _GROUP_CHARACTERS)

    def close(self, even_if_empty: bool = True) -> None:
        """Write what is left. An empty table still gets one file, so that the folder can be read."""
        self._flush_tables(all_of_them=True)
        if self._group or (even_if_empty and not self.rows):
            self._flush()
        self._end_part()

    def _flush(self) -> None:
        import pyarrow as pa

        self._write(pa.Table.from_pylist(self._group, schema=self.columns))
        self._group, self._characters = [], 0

    def _flush_tables(self, all_of_them: bool) -> None:
        import pyarrow as pa

        waiting = sum(table.num_rows for table in self._tables)
        if not waiting or (waiting < _GROUP_ROWS and not all_of_them):
            return
        rows = pa.concat_tables(self._tables)
        while rows.num_rows >= _GROUP_ROWS or (all_of_them and rows.num_rows):
            size = min(_GROUP_ROWS, rows.num_rows, self.rows_per_part - self._in_part)
            self._write(rows.slice(0, size))
            rows = rows.slice(size)
            if self._in_part >= self.rows_per_part:
                self._end_part()
        self._tables = [rows] if rows.num_rows else []

    def _write(self, group: pa.Table) -> None:
        import pyarrow.parquet as pq

        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"part-{self._part:05d}.parquet"
            self._file = pq.ParquetWriter(self.folder / name, self.columns, compression="zstd", compression_level=1)
        if group.num_rows:
            self._file.write_table(group)
        self._in_part += group.num_rows

    def _end_part(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file, self._in_part = None, 0
            self._part += 1


class ShardWriter:
    """Writes records of one kind below `folder/records`. A context manager; `rows` counts what was written."""

    def __init__(self, folder: Path, kind: str, rows_per_shard: int = 20_000) -> None:
        self.kind = kind
        self._cls = KINDS[kind]
        self._parts = Parts(folder / RECORDS, schema(kind), rows_per_shard)

    @property
    def rows(self) -> int:
        """How many records were written so far."""
        return self._parts.rows

    def write(self, record: Record) -> None:
        """Append one record. Raises TypeError when it is of another kind."""
        if type(record) is not self._cls:
            raise TypeError(f"a {type(record).__name__} does not belong among {self.kind}")
        row = to_row(record)
        self._parts.add(row, _characters(row))

    def write_table(self, rows: pa.Table) -> None:
        """Append rows that are a table with the columns of `schema(kind)` already."""
        self._parts.add_table(rows)

    def close(self) -> None:
        """Finish the last shard."""
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _characters(value: Any) -> int:
    """About how much text a row holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 8


def shards_of(source: Artifact | Path) -> list[Path]:
    """The shard files of a fledge folder in order; empty where `source` is a raw file or folder."""
    path = source.path if isinstance(source, Artifact) else Path(source)
    shards = sorted((path / RECORDS).glob("part-*.parquet"))
    return shards if shards and _kind_of_shard(shards[0]) else []  # others name their files so, too


def kind_in(source: Artifact | Path) -> str:
    """Which kind of records lies there: what the shards say, else what the raw files look like."""
    if shards := shards_of(source):
        return _kind_of_shard(shards[0])
    from fledge.records.formats import detect

    return detect(source.path if isinstance(source, Artifact) else Path(source)).kind


def _kind_of_shard(shard: Path) -> str:
    import pyarrow.parquet as pq

    metadata: dict[bytes, bytes] = pq.read_schema(shard).metadata or {}
    return metadata.get(b"fledge.kind", b"").decode()


def read(source: Artifact | Path, kind: str, rejects: Rejects | None = None) -> Iterator[Record]:
    """Records of `kind` from a fledge folder, or from any raw file or folder through `records.formats`, as a stream.

    Conversations may be read as documents (see `kinds.as_document`). Malformed rows of raw files go to `rejects`.
    Raises FledgeError where the folder holds another kind, or a raw file no usable row.
    """
    shards = shards_of(source)
    if not shards:
        from fledge.records.formats import load

        yield from load(source.path if isinstance(source, Artifact) else Path(source), kind, rejects)
        return
    for shard in shards:
        yield from read_shard(shard, kind)


def read_shard(shard: Path, kind: str) -> Iterator[Record]:
    """Records of `kind` from one shard of a fledge folder. Raises FledgeError where it holds another kind."""
    found = _kind_of_shard(shard)
    if found != kind and (found, kind) != ("conversations", "documents"):
        folder = shard.parent.parent
        raise FledgeError(t("{path} holds {found} where {wanted} are wanted", path=folder, found=found, wanted=kind))
    for row in _rows([shard]):
        record = from_row(found, row)
        yield as_document(record) if isinstance(record, Conversation) and kind == "documents" else record


def _rows(files: list[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for file in files:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1_024):
                yield from batch.to_pylist()


def count(source: Artifact | Path, kind: str = "") -> int:
    """How many records lie there; raw files are read for it (as `kind`, or as what they look like)."""
    import pyarrow.parquet as pq

    if shards := shards_of(source):
        return sum(pq.read_metadata(shard).num_rows for shard in shards)
    return sum(1 for _ in read(source, kind or kind_in(source)))
