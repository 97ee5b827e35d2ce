"""A corpus as pieces of work: the row groups of its shards, raw files made into shards first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.artifact import Artifact
from fledge.records.kinds import schema
from fledge.records.rejects import Rejects
from fledge.records.shards import ShardWriter, kind_in, read, shards_of

if TYPE_CHECKING:
    import pyarrow as pa

DONE = "done.json"


@dataclass(frozen=True)
class Rows:
    """Where a chunk's rows lie: a row group of a Parquet shard, or (group -1) the file of an earlier pass."""

    file: Path
    group: int = -1
    count: int = 0

    def read(self, kind: str) -> pa.Table:
        """The rows, with the columns of `schema(kind)`."""
        import pyarrow as pa
        import pyarrow.ipc as ipc
        import pyarrow.parquet as pq

        if self.group < 0:
            with pa.OSFile(str(self.file)) as source:
                return ipc.open_file(source).read_all()
        columns = schema(kind)
        with pq.ParquetFile(self.file) as shard:
            return shard.read_row_group(self.group, columns=columns.names).cast(columns)


def rows_of(
    data: Artifact, folder: Path, told: Callable[[int], Any] = lambda rows: None, kind: str = ""
) -> tuple[str, list[Rows]]:
    """The kind of a corpus and its chunks in order. Raw files become shards of `kind` (or of what they look like) below
    `folder`, once; what cannot be read of them is kept in `folder/rejected`."""
    kind = kind or kind_in(data)
    if shards_of(data):
        return kind, chunks_of(data)

    def make(making: Path) -> dict[str, Any]:
        with Rejects(making) as rejects, ShardWriter(making, kind) as writer:
            for record in read(data, kind, rejects):
                writer.write(record)
                told(writer.rows)
        return {}

    made_once(folder, make)
    return kind, chunks_of(Artifact(folder))


def chunks_of(data: Artifact) -> list[Rows]:
    """The row groups of all shards, in order; empty ones are left out."""
    import pyarrow.parquet as pq

    chunks = []
    for shard in shards_of(data):
        metadata = pq.read_metadata(shard)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        chunks += [Rows(shard, group, size) for group, size in enumerate(sizes) if size]
    return chunks


def set_aside(folders: Iterable[Path], out: Path) -> dict[str, dict[str, int]]:
    """Keep what `rows_of` could not read below `out` as well. Returns the counts by step and reason."""
    with Rejects(out) as rejects:
        for folder in folders:
            rejects.take_from(folder)
    return rejects.reasons


def made_once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `make` noted about the folder it filled; the folder is there whole, or not at all."""
    done = folder / DONE
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    making = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    notes = make(making)
    (making / DONE).write_text(json.dumps(notes, ensure_ascii=False, sort_keys=True), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return notes


def keep(file: Path, target: Path) -> None:
    """The file at another place as well: as a second name where the file system has those, else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
