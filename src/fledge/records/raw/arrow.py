"""Arrow files as rows: what `datasets.save_to_disk` leaves in a folder, and Feather.

A class is a number there, and its name stands in the schema that `datasets` wrote: the row gets the name.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from fledge.records.raw.rows import Limits, RawRow
from fledge.records.rejects import Reason

if TYPE_CHECKING:
    import pyarrow as pa

BESIDE = ("dataset_info.json", "state.json", "dataset_dict.json")
"""What `save_to_disk` writes beside its Arrow files; no data."""
_MAGIC = b"ARROW1"


def arrow(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
    """The rows of an Arrow file, of the streaming format as of the random-access one, batch by batch."""
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(stream, limits):
            for row in named_rows(batch):
                yield RawRow(f"{name}[{number}]", row)
                number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        yield RawRow(f"{name}[{number}]", error=Reason("is not valid Arrow: {error}", error=error), last=True)


def _batches(stream: BinaryIO, limits: Limits) -> Iterator[pa.RecordBatch]:
    import pyarrow.ipc as ipc

    head = stream.read(len(_MAGIC))
    if stream.seekable():
        stream.seek(0)
        source: BinaryIO = stream
    else:
        source = io.BytesIO(head + stream.read(limits.whole))
    if head != _MAGIC:
        with ipc.open_stream(source) as batches:
            for batch in batches:
                yield from _small(batch)
        return
    with ipc.open_file(source) as file:
        for i in range(file.num_record_batches):
            yield from _small(file.get_batch(i))


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """At most 1,000 rows at a time become Python objects."""
    for start in range(0, batch.num_rows, 1_000):
        yield batch.slice(start, 1_000)


def named_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch with the names of classes in place of their numbers."""
    classes = classes_of(batch.schema)
    for row in batch.to_pylist():
        for column, names in classes.items():
            if isinstance(row[column], int) and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
        yield row


def classes_of(schema: pa.Schema) -> dict[str, list[str]]:
    """Column → the names of its classes, from what `datasets` keeps in the schema's metadata."""
    said = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features: dict[str, Any] = json.loads(said).get("info", {}).get("features", {})
        named = {name: f["names"] for name, f in features.items() if isinstance(f, dict) and "names" in f}
    except (ValueError, AttributeError):
        return {}
    return {name: names for name, names in named.items() if name in schema.names and isinstance(names, list)}
