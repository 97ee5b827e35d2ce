"""What `fledge data inspect` finds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fledge.core.errors import FledgeError
from fledge.data.inspect import EDGES, inspect
from fledge.data.stages import Refine
from fledge.data.texts import size_of
from fledge.records.shards import read

from .conftest import Runner, corpus, english, talk, write


def test_a_folder_of_records(tmp_path: Path, run: Runner) -> None:
    rows = [*(talk("hi", "hello", language="en", id=str(i)) for i in range(3)), talk("你好", "你好呀，请坐。", id="zh")]
    rows.append(talk(english(random.Random(0)), "ok"))
    report = inspect(run(Refine(data="a", steps=["exact_dedup"]), {"a": write(tmp_path / "a", rows)}).path)
    assert (report.kind, report.rows) == ("conversations", 3)
    assert report.bytes == sum(map(size_of, [rows[0], *rows[3:]]))
    assert report.languages == {"en": 2, "zh": 1}, "named where the rows do not say"
    assert sum(report.lengths) == 3 and report.lengths[0] == 2 and len(report.lengths) == len(EDGES)
    assert report.fields["messages"] == 3 and report.fields["language"] == 1 and "meta" not in report.fields
    assert report.examples[0] == "hi ⏎ hello"
    assert report.rejected == {"exact_dedup": {"same text": 2}}
    text = report.to_text()
    assert "3 rows" in text and "same text  2" in text and "你好" in text
    assert json.loads(json.dumps(report.to_json()))["rows"] == 3


def test_in_chinese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_LANG", "zh")
    text = inspect(write(tmp_path / "a", corpus(1, 4)).path).to_text()
    assert "4 行" in text and "示例" in text and "rows" not in text


def test_a_raw_file_with_bad_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"instruction": "a?", "output": "b"}\n{"instruction": \n', encoding="utf-8")
    report = inspect(file)
    assert (report.kind, report.rows, report.unreadable) == ("conversations", 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"], "nothing is left beside it"
    with pytest.raises(FledgeError):
        inspect(tmp_path / "none.jsonl")


def test_records_are_read_once_and_unchanged(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", corpus(2, 6)).path
    before = [p.read_bytes() for p in sorted(folder.rglob("*.parquet"))]
    inspect(folder)
    assert before == [p.read_bytes() for p in sorted(folder.rglob("*.parquet"))]
    assert len(list(read(folder, "documents"))) == 6
