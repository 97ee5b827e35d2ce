"""Frames of other systems: in and out through Arrow without losing a row, a column or the order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from fledge.core.errors import FledgeError
from fledge.records.frames import batches, to_dask, to_spark, write_frame
from fledge.records.kinds import Conversation, Document, Message, Record, kind_of
from fledge.records.shards import ShardWriter, read

DOCUMENTS = [
    Document(f"text {i} 文本\n第二行", f"id{i}", "zh" if i % 2 else "en", "made", {"page": str(i), "作者": "无名氏"})
    for i in range(50)
]
TALKS = [
    Conversation(
        (Message("user", f"question {i}？"), Message("assistant", "答", tool_calls='[{"name": "f"}]')), f"c{i}"
    )
    for i in range(20)
]


def folder(path: Path, records: list[Any]) -> Path:
    with ShardWriter(path, kind_of(records[0]), rows_per_shard=20) as writer:
        for record in records:
            writer.write(record)
    return path


def back(path: Path, kind: str) -> list[Record]:
    return list(read(path, kind))


@pytest.mark.parametrize("records", [DOCUMENTS, TALKS])
def test_arrow_and_polars_give_back_what_they_took(tmp_path: Path, records: list[Any]) -> None:
    kind = kind_of(records[0])
    source = folder(tmp_path / "a", records)
    table = pa.Table.from_batches(batches(source, rows=7))
    for name, frame in (("arrow", table), ("polars", pl.from_arrow(table)), ("pandas", table.to_pandas())):
        if name == "pandas" and kind == "conversations":
            continue  # pandas makes objects of nested columns
        assert write_frame(frame, tmp_path / name, kind) == len(records)
        assert back(tmp_path / name, kind) == records


@pytest.mark.parametrize("records", [DOCUMENTS, TALKS])
def test_dask(tmp_path: Path, records: list[Any]) -> None:
    pytest.importorskip("dask.dataframe", reason="dask is not installed (pip install 'fledge-llm[dask]')")
    kind = kind_of(records[0])
    frame = to_dask(folder(tmp_path / "a", records))
    assert frame.npartitions == -(-len(records) // 20)
    write_frame(frame, tmp_path / "back", kind)
    assert back(tmp_path / "back", kind) == records
    write_frame(frame[frame["id"].str.endswith("7")], tmp_path / "some", kind)
    assert back(tmp_path / "some", kind) == [record for record in records if record.id.endswith("7")]


def test_spark(tmp_path: Path) -> None:
    pyspark = pytest.importorskip("pyspark.sql", reason="pyspark is not installed (pip install 'fledge-llm[spark]')")
    session = pyspark.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        for name, records in (("documents", DOCUMENTS), ("conversations", TALKS)):
            frame = to_spark(folder(tmp_path / name, records), session)
            assert write_frame(frame.orderBy("id"), tmp_path / f"{name}-back", name) == len(records)
            assert back(tmp_path / f"{name}-back", name) == sorted(records, key=lambda record: record.id)
    finally:
        session.stop()


def test_missing_columns_are_filled_in_as_for_raw_files(tmp_path: Path) -> None:
    write_frame(
        pl.DataFrame({"text": ["你好", "hello"], "language": ["zh", None], "extra": [1, 2]}), tmp_path, "documents"
    )
    assert back(tmp_path, "documents") == [Document("你好", language="zh"), Document("hello")]


def test_what_is_no_frame_or_lacks_the_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FledgeError, match="no column"):
        write_frame(pl.DataFrame({"txet": ["a"]}), tmp_path / "a", "documents")
    with pytest.raises(FledgeError, match="no frame"):
        write_frame([1, 2], tmp_path / "b", "documents")
    with pytest.raises(FledgeError, match="holds no records of fledge"):
        list(batches(tmp_path))
