"""Tables as rows: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import BinaryIO

from fledge.records.raw.arrow import named_rows
from fledge.records.raw.rows import Limits, RawRow, Reader, lines, shown, too_long
from fledge.records.rejects import Reason


def table(delimiter: str) -> Reader:
    """The reader of tables whose cells are divided by `delimiter`; the first line names the columns."""

    def read(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
        csv.field_size_limit(limits.row)
        source = _Lines(stream, limits.row)
        reader = csv.reader(source, delimiter=delimiter)
        header = [name.strip() for name in next(reader, [])]
        while True:
            line = source.number + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield RawRow(f"{name}:{line}", error=Reason("is not valid CSV: {error}", error=error))
                continue
            for number, length, start in source.too_long:
                yield too_long(f"{name}:{number}", length, start)
                line = number + 1
            source.too_long.clear()
            if cells is None:
                return
            if cells:
                yield _cells(f"{name}:{line}", header, cells, delimiter)

    return read


class _Lines:
    """Lines as the csv module takes them. Bytes that are not UTF-8 come through as lone surrogates, so that only their
    own row is set aside; a line beyond the limit is left out and noted."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._lines = lines(stream, limit)
        self.number = 0
        self.too_long: list[tuple[int, int, str]] = []

    def __iter__(self) -> Iterator[str]:
        for number, line, length in self._lines:
            self.number = number
            if length > len(line):
                self.too_long.append((number, length, shown(line)))
            else:
                yield line.decode("utf-8", "surrogateescape") + "\n"


def _cells(where: str, header: list[str], cells: list[str], delimiter: str) -> RawRow:
    raw = delimiter.join(cells)
    if len(cells) != len(header):
        error = Reason("has {found} cells where the header has {wanted}", found=len(cells), wanted=len(header))
        return RawRow(where, error=error, raw=raw)
    return RawRow(where, dict(zip(header, cells, strict=True)), raw=raw)


def parquet(stream: BinaryIO, name: str, limits: Limits) -> Iterator[RawRow]:
    """The rows of a Parquet file. A row group whose footer promises more than `limits.whole` at a ratio beyond the
    limits is not unpacked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = stream if stream.seekable() else io.BytesIO(stream.read(limits.whole))
    try:
        with pq.ParquetFile(source) as file:
            number = 0
            for group in range(file.metadata.num_row_groups):
                said = file.metadata.row_group(group)
                if found := _swollen(said, limits):
                    reason = Reason("unpacks to more than a file may hold")
                    yield RawRow(f"{name}[{number}]", error=reason, found=found)
                    number += said.num_rows
                    continue
                for batch in file.iter_batches(batch_size=1_024, row_groups=[group]):
                    for row in named_rows(batch):
                        yield RawRow(f"{name}[{number}]", row)
                        number += 1
    except (pa.ArrowException, OSError) as error:  # no Parquet at all, or a damaged page
        yield RawRow(name, error=Reason("is not valid Parquet: {error}", error=error), last=True)


def _swollen(group: object, limits: Limits) -> str:
    """What a row group's footer says of its size where that is beyond the limits."""
    columns = [group.column(i) for i in range(group.num_columns)]  # type: ignore[attr-defined]
    packed = sum(column.total_compressed_size for column in columns)
    unpacked = sum(column.total_uncompressed_size for column in columns)
    if unpacked > limits.whole and unpacked > limits.ratio * max(packed, 1):
        return f"{unpacked} bytes from {packed}"
    return ""
