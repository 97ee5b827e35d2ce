"""`data.convert`: what is written is read back; what a spelling cannot hold is kept aside."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fledge.core.errors import FledgeError
from fledge.data.stages import Convert, Refine
from fledge.records.kinds import Answer, Conversation, Document, Labelled, Message, Preference, Record
from fledge.records.rejects import read_rejects
from fledge.records.shards import kind_in, read

from .conftest import Runner, talk, write

CALL = Conversation((Message("user", "q"), Message("assistant", "", tool_calls='[{"function": {"name": "f"}}]')), "c")
CHATS = [talk("q", "a", "再问", "再答", id="1", language="zh", source="web"), talk("q2", "a2", id="2", meta={"k": "v"})]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("spelling", ["alpaca", "sharegpt", "messages"])
def test_conversations_there_and_back(run: Runner, tmp_path: Path, spelling: str, ending: str) -> None:
    data = write(tmp_path / "a", CHATS)
    out = run(Convert(data="a", to=spelling, file=ending), {"a": data})
    assert sorted(p.name for p in out.path.iterdir()) == [f"data.{ending}"] and out.kind == "conversations"
    assert list(read(out, "conversations")) == CHATS
    assert out.metrics["rows"] == 2 and out.metrics["format"] == spelling


def test_the_files_are_what_other_tools_read(run: Runner, tmp_path: Path) -> None:
    data = {"a": write(tmp_path / "a", CHATS)}
    line = (run(Convert(data="a", to="sharegpt"), data).path / "data.jsonl").read_text("utf-8").splitlines()[1]
    assert json.loads(line) == {
        "conversations": [{"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}],
        "id": "2", "meta": {"k": "v"},
    }  # fmt: skip
    rows = json.loads((run(Convert(data="a", to="alpaca", file="json"), data).path / "data.json").read_text("utf-8"))
    assert (rows[0]["instruction"], rows[0]["history"]) == ("再问", [["q", "a"]])
    with (run(Convert(data="a", to="alpaca", file="csv"), data).path / "data.csv").open(encoding="utf-8") as file:
        assert [row["output"] for row in csv.DictReader(file)] == ["再答", "a2"]
    table = pq.read_table(run(Convert(data="a", to="messages", file="parquet"), data).path / "data.parquet")
    assert table["messages"][1].as_py()[1]["content"] == "a2"


def test_a_folder_of_datasets(run: Runner, tmp_path: Path) -> None:
    """What `datasets.load_from_disk` looks for (version 5.2 opens such a folder), and back."""
    out = run(Convert(data="a", to="messages", file="save_to_disk"), {"a": write(tmp_path / "a", CHATS)})
    state = json.loads((out.path / "state.json").read_text("utf-8"))
    (named,) = state["_data_files"]
    with pa.OSFile(str(out.path / named["filename"])) as file:
        rows = pa.ipc.open_stream(file).read_all().to_pylist()
    assert [row["messages"][-1]["content"] for row in rows] == ["再答", "a2"]
    assert {"_fingerprint", "_format_type", "_split"} <= state.keys() and (out.path / "dataset_info.json").is_file()
    assert list(read(out, "conversations")) == CHATS and out.metrics["rows"] == 2


def test_what_the_spelling_cannot_hold_is_kept_aside(run: Runner, tmp_path: Path) -> None:
    data = {"a": write(tmp_path / "a", [*CHATS, CALL])}
    out = run(Convert(data="a", to="alpaca"), data)
    (row,) = read_rejects(out.path)
    assert (row["step"], row["value"], row["where"]) == ("convert", "alpaca", "c") and '"tool_calls"' in row["row"]
    assert out.metrics["rejected"] == {"convert": 1}
    assert list(read(out, "conversations")) == CHATS, "and is not read with the others"
    assert list(read(run(Convert(data="a", to="messages"), data), "conversations")) == [*CHATS, CALL]
    with pytest.raises(FledgeError, match="not one record"):
        run(Convert(data="b", to="alpaca"), {"b": write(tmp_path / "b", [CALL])})


def test_every_kind_has_its_spelling(run: Runner, tmp_path: Path) -> None:
    kinds: dict[str, Record] = {
        "classification": Labelled("文本", "正面", "1"),
        "text": Document("some text", "2"),
        "preference": Preference((Message("user", "q"),), (Answer("a", 1), Answer("b", 2)), "3"),
        "ranking": Preference((Message("user", "q"),), (Answer("a", 2), Answer("b", 1, "m"), Answer("c", 2)), "4"),
    }
    for spelling, record in kinds.items():
        out = run(Convert(data="a", to=spelling), {"a": write(tmp_path / spelling, [record])})
        assert list(read(out, kind_in(out))) == [record], spelling


def test_raw_files_and_conversations_as_text(run: Runner, tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"instruction": "问", "output": "答"}\n{"instruction": \n', encoding="utf-8")
    from fledge.core.artifact import Records

    out = run(Convert(data="a", to="text"), {"a": Records(raw)})
    assert [vars(r)["text"] for r in read(out, "documents")] == ["问\n答"]
    assert [row["where"] for row in read_rejects(out.path)] == ["raw.jsonl:2"]
    again = run(Refine(data="a", steps=["exact_dedup"]), {"a": out})
    assert [vars(r)["text"] for r in read(again, "documents")] == ["问\n答"], "the next stage takes it as it is"
    with pytest.raises(FledgeError, match="holds conversations where preferences"):
        run(Convert(data="a", to="preference"), {"a": write(tmp_path / "a", CHATS)})


def test_the_same_bytes_each_time(run: Runner, tmp_path: Path) -> None:
    data: dict[str, Any] = {"a": write(tmp_path / "a", CHATS)}
    for ending in ("jsonl", "csv", "parquet"):
        outs = [run(Convert(data="a", to="messages", file=ending), data).path / f"data.{ending}" for _ in range(2)]
        assert outs[0].read_bytes() == outs[1].read_bytes()
