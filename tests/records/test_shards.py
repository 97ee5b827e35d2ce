"""Records on disk: what goes in comes out, with the same bytes each time, and others can read it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.artifact import Conversations
from fledge.core.errors import FledgeError
from fledge.records.kinds import (
    KINDS,
    Answer,
    Conversation,
    Document,
    Labelled,
    Message,
    Preference,
    Record,
    as_document,
    from_row,
    kind_of,
    texts,
    to_row,
)
from fledge.records.rejects import Rejects, read_rejects
from fledge.records.shards import ShardWriter, count, kind_in, read
from tests.records.strategies import records

TALK = Conversation((Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "你好")), language="zh")


def write(folder: Path, kind: str, rows: list[Record], rows_per_shard: int = 20_000) -> list[Path]:
    with ShardWriter(folder, kind, rows_per_shard) as out:
        for row in rows:
            out.write(row)
    return sorted((folder / "records").iterdir())


def digests(files: list[Path]) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize("kind", list(KINDS))
@given(data=st.data())
def test_records_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    rows = data.draw(st.lists(records(kind), max_size=4))
    assert [from_row(kind, to_row(row)) for row in rows] == rows
    write(folder, kind, rows)
    assert list(read(folder, kind)) == rows
    assert kind_in(folder) == kind and count(folder) == len(rows)


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    rows: list[Record] = [Document(f"text {i}", meta={"b": "2", "a": str(i)}) for i in range(100)]
    swapped: list[Record] = [Document(f"text {i}", meta={"a": str(i), "b": "2"}) for i in range(100)]
    files = write(tmp_path / "a", "documents", rows, rows_per_shard=30)
    assert [file.name for file in files] == [f"part-{i:05d}.parquet" for i in range(4)]
    assert [pq.read_metadata(file).num_rows for file in files] == [30, 30, 30, 10]
    assert digests(files) == digests(write(tmp_path / "b", "documents", swapped, rows_per_shard=30))
    assert list(read(tmp_path / "a", "documents")) == rows


def test_big_rows_are_written_in_small_groups(tmp_path: Path) -> None:
    files = write(tmp_path, "documents", [Document("x" * 5_000_000, id=str(i)) for i in range(8)])
    assert len(files) == 1 and pq.read_metadata(files[0]).num_row_groups == 2


def test_other_libraries_read_the_shards_as_they_are(tmp_path: Path) -> None:
    (file,) = write(tmp_path / "c", "conversations", [TALK])
    (row,) = pl.read_parquet(file).to_dicts()
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][2]["content"] == "你好" and row["language"] == "zh"
    answers = (Answer("good", 1, "a person"), Answer("bad", 2, "a model"))
    (file,) = write(tmp_path / "p", "preferences", [Preference((Message("user", "Hi"),), answers, meta={"k": "v"})])
    (row,) = pl.read_parquet(file).to_dicts()
    assert row["answers"][0] == {"content": "good", "rank": 1, "by": "a person"}
    assert row["meta"] == [{"key": "k", "value": "v"}]
    # `datasets` has no type for Arrow's maps: strings, numbers, structs and lists only.
    assert "map" not in str(pq.read_schema(file).types)


def test_an_empty_folder_of_shards_can_be_read(tmp_path: Path) -> None:
    (file,) = write(tmp_path, "labelled", [])
    assert pl.read_parquet(file).columns == ["text", "label", "id", "language", "source", "meta"]
    assert list(read(tmp_path, "labelled")) == [] and count(tmp_path) == 0


def test_conversations_are_read_as_documents(tmp_path: Path) -> None:
    write(tmp_path, "conversations", [TALK])
    assert list(read(Conversations(tmp_path), "documents")) == [as_document(TALK)]
    assert as_document(TALK) == Document("Be kind.\nHi\n你好", TALK.id, "zh")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "labelled", [Labelled("a", "b")])
    with pytest.raises(FledgeError, match="holds labelled where documents are wanted"):
        next(read(tmp_path, "documents"))
    with ShardWriter(tmp_path / "x", "documents") as out, pytest.raises(TypeError, match="Labelled"):
        out.write(Labelled("a", "b"))


def test_a_raw_file_is_read_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "Hi", "response": "Hello"}\n{"prompt": "Bye", "response": "So long"}\n')
    assert kind_in(file) == "conversations" and count(file) == 2
    assert [record.text for record in read(file, "documents") if isinstance(record, Document)] == [
        "Hi\nHello",
        "Bye\nSo long",
    ]


def test_parquet_of_others_in_a_folder_of_that_name_is_raw(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "records" / "part-0.parquet")
    assert kind_in(tmp_path) == "documents" and list(read(tmp_path, "documents")) == [Document("a")]


def test_a_missing_id_is_a_hash_of_the_content_alone() -> None:
    assert Document("a").id == Document("a", language="en", source="x", meta={"k": "v"}).id
    assert len({Document("a").id, Document("b").id, Labelled("a", "b").id, Document("a", id="mine").id}) == 4
    assert Document("a", id="mine").id == "mine"


def test_pairs_are_all_that_ranks_decide() -> None:
    a, b, c, d = (Answer(text, rank) for text, rank in (("a", 2), ("b", 1), ("c", 2), ("d", 3)))
    pairs = list(Preference((Message("user", "?"),), (a, b, c, d)).pairs())
    assert pairs == [(b, a), (b, c), (b, d), (a, d), (c, d)]


def test_texts_are_everything_somebody_wrote() -> None:
    preference = Preference((Message("user", "q"),), (Answer("good", 1), Answer("bad", 2)))
    assert list(texts(preference)) == ["q", "good", "bad"] and kind_of(preference) == "preferences"
    assert list(texts(TALK)) == ["Be kind.", "Hi", "你好"]


def test_rejected_rows_are_kept_and_counted(tmp_path: Path) -> None:
    with Rejects(tmp_path) as rejects:
        rejects.add("quality", "too short", value="3", row="abc", where="1")
        rejects.add("quality", "too short", row="\udcff", where="2")
        rejects.add("language", "neither English nor Chinese", row="où", where="3")
    assert rejects.counts == {"language": 1, "quality": 2}
    assert rejects.reasons["quality"] == {"too short": 2}
    rows = list(read_rejects(tmp_path))
    assert rows[0] == {"step": "quality", "reason": "too short", "value": "3", "where": "1", "row": "abc"}
    assert rows[1]["row"] == "\\udcff" and len(rows) == 3


def test_nothing_is_written_where_nothing_was_rejected(tmp_path: Path) -> None:
    with Rejects(tmp_path) as rejects:
        pass
    assert rejects.counts == {} and not list(tmp_path.iterdir()) and list(read_rejects(tmp_path)) == []
