"""`fledge index`, `search` and `ask`, as a person calls them; the index as an artifact of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fledge.cli import use
from fledge.cli.main import cli
from fledge.core.errors import FledgeError
from fledge.core.stage import all_stages
from fledge.inference.retrieval.index import Index
from tests.inference import tiny
from tests.inference.retrieval.library import Reader


def call(*arguments: str) -> str:
    done = CliRunner().invoke(cli, list(arguments), catch_exceptions=False, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout


def test_a_folder_becomes_an_index_that_is_searched(shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / "idx"
    said = call("index", str(shelf), "--out", str(out), "--size", "60", "--overlap", "10", "--segmenter", "bigrams")
    assert said.splitlines()[-1] == str(out)
    assert Index.open(out).cut.size == 60
    for name in (str(out), "index/index", "index"):  # a folder, RUN/STAGE, RUN
        found = json.loads(call("find", name, "差旅费由谁审核", "-k", "1", "--json"))
        assert [row["source"] for row in found] == ["handbook.md"] and found[0]["where"].startswith("handbook.md#L")
    assert "[1] guide.md#L" in call("find", str(out), "By whom is the boiler repaired?")
    assert "nothing was found" in call("find", str(out), "qqqq")
    call("index", str(shelf), "--size", "60", "--overlap", "10", "--segmenter", "bigrams", "--previous", str(out),
         "--out", str(tmp_path / "again"), "--name", "second")  # fmt: skip
    assert (tmp_path / "again" / "index.json").read_bytes() == (out / "index.json").read_bytes()
    with pytest.raises(FledgeError, match="neither an index"):
        call("find", str(shelf), "a")


def test_questions_are_answered_with_their_sources(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[tuple[Any, ...]] = []

    def reader(*given: Any) -> Any:
        opened.append(given)
        return Reader()

    monkeypatch.setattr(use, "_engine", reader)
    said = call("ask", str(index.folder), "my-model", "By whom is the boiler repaired?")
    assert "harbour workshop" in said and "[1] guide.md#L" in said and opened[0][:3] == ("my-model", "auto", "native")
    row = json.loads(call("ask", str(index.folder), "m", "差旅费由谁审核？", "--json"))
    assert "财务部" in row["answer"] and row["problems"] == [] and row["citations"][0]["exists"]
    file = tmp_path / "questions.jsonl"
    rows = [
        {"question": "By whom is the boiler repaired?", "answers": ["harbour workshop"], "sources": ["guide.md"]},
        {"question": "差旅费由谁审核？", "answers": ["财务部"], "sources": ["handbook.md"]},
    ]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    measured = json.loads(call("ask", str(index.folder), "m", "--test", str(file), "--json"))
    assert measured["closed"]["right"]["value"] == 0 and measured["with_sources"]["right"]["value"] == 1
    assert measured["recall"] == 1
    said = call("ask", str(index.folder), "m", "--test", str(file))
    assert "with sources" in said and "100%" in said
    lines = CliRunner().invoke(cli, ["ask", str(index.folder), "m"], input="By whom is the boiler repaired?\n\n")
    assert "harbour workshop" in lines.stdout
    talk = "By whom is the boiler repaired?\n/quit\n"
    talked = CliRunner().invoke(cli, ["chat", "m", "--index", str(index.folder)], input=talk, catch_exceptions=False)
    assert "harbour workshop" in talked.stdout and "[1] guide.md#L" in talked.stdout


def test_a_model_of_a_folder_is_asked(index: Index, model: Any, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "tiny", model)
    row = json.loads(call("ask", str(index.folder), str(folder), "差旅费由谁审核？", "--json", "--max-tokens", "8"))
    assert row["answer"] and row["citations"] == []  # it has learned nothing


def test_the_stage_refuses_an_overlap_as_large_as_a_passage() -> None:
    stage = all_stages()["index"].model_validate({"data": "x", "size": 20, "overlap": 20})
    assert [problem.where for problem in stage.check()] == ["overlap"]
