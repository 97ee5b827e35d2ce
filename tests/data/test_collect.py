"""Collecting from files, folders, globs and packages."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fledge.core.artifact import Conversations, Documents
from fledge.core.errors import FledgeError
from fledge.data.collect import some_of
from fledge.data.stages import Collect
from fledge.records.kinds import Document
from fledge.records.rejects import read_rejects
from fledge.records.shards import read

from .conftest import Runner, corpus, digests, write


def alpaca(file: Path, n: int, start: int = 0) -> None:
    rows = [{"instruction": f"Say number {i}", "output": f"It is {i}."} for i in range(start, start + n)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_files_folders_globs_and_fledge_folders_side_by_side(tmp_path: Path, run: Runner) -> None:
    (tmp_path / "more").mkdir()
    alpaca(tmp_path / "one.jsonl", 3)
    alpaca(tmp_path / "more/two.jsonl", 2, 10)
    alpaca(tmp_path / "g1.jsonl", 1, 20)
    alpaca(tmp_path / "g2.jsonl", 1, 30)
    sources = [str(tmp_path / "one.jsonl"), str(tmp_path / "more"), str(tmp_path / "g?.jsonl")]
    made = run(Collect(kind="conversations", sources=sources))
    assert isinstance(made, Conversations)
    answers = [record.messages[1].content for record in read(made, "conversations")]  # type: ignore[union-attr]
    assert answers == [f"It is {i}." for i in (0, 1, 2, 10, 11, 20, 30)], "in the order of the sources"
    assert list(made.metrics["rows_by_source"].values()) == [3, 2, 2] and made.metrics["rows"] == 7
    again = run(Collect(kind="conversations", sources=[str(made.path)]))
    assert again.metrics["rows"] == 7, "what was collected can be collected"


def test_texts_are_documents(tmp_path: Path, run: Runner) -> None:
    (tmp_path / "a.txt").write_text("国家保护公民的合法权益。", encoding="utf-8")
    made = run(Collect(kind="documents", sources=[str(tmp_path / "a.txt")]))
    assert isinstance(made, Documents)
    (document,) = read(made, "documents")
    assert document.text == "国家保护公民的合法权益。"  # type: ignore[union-attr]
    assert document.source


def test_bad_lines_are_kept_with_their_place(tmp_path: Path, run: Runner) -> None:
    file = tmp_path / "rows.jsonl"
    alpaca(file, 2)
    file.write_text(file.read_text() + "\n{broken", encoding="utf-8")
    made = run(Collect(kind="conversations", sources=[str(file)]))
    (bad,) = read_rejects(made.path)
    assert (
        bad["where"] == "rows.jsonl:3" and sum(map(sum, (r.values() for r in made.metrics["rejected"].values()))) == 1
    )


def test_a_limit_takes_the_same_rows_whatever_the_order_and_a_larger_one_more() -> None:
    rows = [Document(f"text {i}", f"id{i}") for i in range(200)]
    shuffled = random.Random(0).sample(rows, len(rows))
    ten, ten_again, twenty = some_of(rows, 10, 1), some_of(shuffled, 10, 1), some_of(rows, 20, 1)
    assert {r.id for r in ten} == {r.id for r in ten_again} < {r.id for r in twenty}
    assert [rows.index(r) for r in ten] == sorted(rows.index(r) for r in ten), "in the order in which they came"
    assert {r.id for r in some_of(rows, 10, 2)} != {r.id for r in ten}
    assert len(some_of(rows, 999, 1)) == 200


def test_the_limit_is_for_each_source(tmp_path: Path, run: Runner) -> None:
    alpaca(tmp_path / "a.jsonl", 30)
    alpaca(tmp_path / "b.jsonl", 3)
    stage = Collect(kind="conversations", sources=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], limit="5")
    made = run(stage)
    assert list(made.metrics["rows_by_source"].values()) == [5, 3]
    assert digests(made.path) == digests(run(stage).path)


def test_the_kind_of_the_output_is_the_kind_asked_for(tmp_path: Path, run: Runner) -> None:
    assert {k: v.kind for k, v in Collect(kind="documents", sources=["x"]).output_kinds().items()} == {"": "documents"}
    folder = write(tmp_path / "a", corpus(1, 4)).path
    with pytest.raises(FledgeError):
        run(Collect(kind="preferences", sources=[str(folder)]))
    with pytest.raises(ValueError, match="kind"):
        Collect(kind="models", sources=["x"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sources"):
        Collect(kind="documents", sources=[])
