"""Records as frames of other systems, and back: everything passes as Arrow, shard by shard.

    for batch in batches(corpus): ...                   # pyarrow.RecordBatch, a stream over all shards
    frame = to_dask(corpus); frame = to_spark(corpus, session)
    write_frame(frame, folder, "documents")             # pandas, polars, pyarrow, DuckDB, Dask or Spark

What comes in need not have every column: ids, languages, sources and meta are filled in as for raw files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError, Problem, listing, missing_extra
from fledge.core.language import t
from fledge.records.kinds import from_row, schema
from fledge.records.shards import ShardWriter, shards_of

if TYPE_CHECKING:
    import pyarrow as pa

NEEDED = {
    "documents": ("text",), "conversations": ("messages",), "preferences": ("prompt", "answers"),
    "ratings": ("prompt", "answer", "score"), "labelled": ("text", "label"), "prompts": ("messages",),
}  # fmt: skip
"""The columns without which a frame's rows are no records of a kind."""


def batches(source: Artifact | Path, rows: int = 2_000) -> Iterator[pa.RecordBatch]:
    """All rows of a fledge folder as Arrow batches of up to `rows`, in order; memory holds one row group.

    Raises FledgeError where there are no shards (raw files go through `data.collect` first).
    """
    import pyarrow.parquet as pq

    for shard in _shards(source):
        with pq.ParquetFile(shard) as file:
            yield from file.iter_batches(batch_size=rows)


def to_dask(source: Artifact | Path) -> Any:
    """A Dask DataFrame with a partition for each shard; nothing is read before it is asked for."""
    try:
        import dask.dataframe as dd
    except ImportError:
        raise missing_extra("dask", "dask") from None
    return dd.read_parquet([str(shard) for shard in _shards(source)], split_row_groups=False)


def to_spark(source: Artifact | Path, session: Any) -> Any:
    """A Spark DataFrame over the shards, read by the executors (who must see the same folder)."""
    return session.read.parquet(*(str(shard) for shard in _shards(source)))


def write_frame(frame: Any, folder: Path, kind: str) -> int:
    """Write a frame's rows, in its order, as records of `kind` below `folder`. Returns how many.

    Anything with Arrow's stream interface (pandas, polars, pyarrow, DuckDB) is taken as it is; Dask gives its
    partitions one after another; Spark's executors write theirs beside `folder` first. Raises FledgeError where a
    column that the kind cannot do without is missing.
    """
    with ShardWriter(folder, kind) as writer:
        for table in _tables(frame, folder):
            _write(table, writer, kind)
    return writer.rows


def _shards(source: Artifact | Path) -> list[Path]:
    shards = shards_of(source)
    if not shards:
        path = source.path if isinstance(source, Artifact) else source
        raise FledgeError(
            Problem(
                t("holds no records of fledge"),
                where=str(path),
                fix=t("collect raw files first: fledge data collect --sources {path}", path=path),
            )
        )
    return shards


def _tables(frame: Any, folder: Path) -> Iterator[pa.Table]:
    import pyarrow as pa

    if hasattr(frame, "sparkSession"):  # it has Arrow's interface too, which would gather all rows in the driver
        yield from _from_spark(frame, folder.with_name(f".{folder.name}.spark"))
    elif hasattr(frame, "to_delayed"):  # Dask
        for partition in frame.to_delayed():
            yield pa.Table.from_pandas(partition.compute(), preserve_index=False)
    elif hasattr(frame, "__arrow_c_stream__"):
        for batch in pa.RecordBatchReader.from_stream(frame):
            yield pa.Table.from_batches([batch])
    else:
        raise FledgeError(
            Problem(
                t("a {type} is no frame that can be read through Arrow", type=type(frame).__name__),
                allowed="pandas, polars, pyarrow, DuckDB, Dask, Spark",
            )
        )


def _from_spark(frame: Any, aside: Path) -> Iterator[pa.Table]:
    """What the executors wrote, in the order of the partitions."""
    import pyarrow.parquet as pq

    shutil.rmtree(aside, ignore_errors=True)
    try:
        frame.write.parquet(str(aside))
        for file in sorted(aside.glob("part-*.parquet")):
            with pq.ParquetFile(file) as part:
                for group in range(part.num_row_groups):
                    yield part.read_row_group(group)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(table: pa.Table, writer: ShardWriter, kind: str) -> None:
    """Whole tables where they have all columns and every id, else row by row."""
    columns = schema(kind)
    missing = [name for name in NEEDED[kind] if name not in table.column_names]
    if missing:
        raise FledgeError(
            Problem(
                t("the frame has no column {names}", names=listing([f'"{name}"' for name in missing])),
                found=listing(table.column_names, 20),
                allowed=listing(columns.names, 20),
            )
        )
    whole = set(columns.names) <= set(table.column_names)
    if whole and not any(table[name].null_count for name in columns.names) and "" not in _values(table["id"]):
        writer.write_table(table)
        return
    for row in table.to_pylist():
        writer.write(from_row(kind, row))


def _values(column: Any) -> set[Any]:
    import pyarrow.compute as pc

    return set(pc.unique(column).to_pylist()) if len(column) else set()
