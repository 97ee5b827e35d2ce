"""The terminal as a user meets it: real processes, exit codes, what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fledge.cli.main import STAGES
from fledge.core.stage import all_stages

RECIPE = """\
name: toy
stages:
  words: {use: toy.words, count: 3}
  halves: {use: toy.halves, data: words}
  learn: {use: toy.learn, data: [halves.first]}
"""


def fledge(*arguments: str, code: int = 0, lang: str = "en") -> str:
    """What `fledge …` prints, standard error included."""
    import os

    done = subprocess.run(
        [sys.executable, "-m", "fledge.cli.main", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "FLEDGE_LANG": lang, "COLUMNS": "160"},
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.fixture
def recipe() -> str:
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    return "r.yaml"


def test_run_show_plan_runs(recipe: str) -> None:
    first = fledge("run", recipe)
    assert "3 of 3 stages to make" in first and "✓ learn" in first
    again = fledge("run", recipe)
    assert "everything is there (3 stages)" in again and "✓" not in again
    shown = json.loads(fledge("show", "toy", "--json"))
    assert shown["name"] == "toy" and [s["name"] for s in shown["stages"]] == ["words", "halves", "learn"]
    assert set(shown["stages"][0]) == {
        "name", "use", "status", "seconds", "fingerprint", "path", "inputs", "metrics"
    }  # fmt: skip
    assert shown["stages"][2]["metrics"] == {"loss": 0.5}
    inputs = shown["stages"][2]["inputs"]
    assert inputs["data.0"]["stage"] == "halves.first"
    assert inputs["data.0"]["fingerprint"] == shown["stages"][1]["fingerprint"]
    assert shown["stages"][1]["metrics"] == {"first": {"rows": 1}, "second": {"rows": 2}}
    assert Path(shown["stages"][0]["path"], "words.txt").is_file()
    assert "every file is as it was made" in fledge("show", "toy", "--verify")
    assert "toy" in fledge("runs") and json.loads(fledge("runs", "--json"))[0]["status"] == "done"
    planned = json.loads(fledge("plan", recipe, "--json", "--set", "learn.train.lr=0.5"))
    assert [s["status"] for s in planned["stages"]] == ["cached", "cached", "make"]
    assert planned["stages"][2]["why"] == ["train.lr: 0.1 → 0.5"]


def test_a_damaged_artifact_is_found(recipe: str) -> None:
    fledge("run", recipe)
    words = Path(json.loads(fledge("show", "toy", "--json"))["stages"][0]["path"], "words.txt")
    words.chmod(0o644)
    words.write_text("something else")
    assert "was changed" in fledge("show", "toy", "--verify", code=2)


def test_garbage_is_collected(recipe: str) -> None:
    fledge("run", recipe, "--set", "learn.train.lr=0.5")
    fledge("run", recipe)
    assert "1 folders" in fledge("gc", "--dry-run")
    assert "toy.learn" in fledge("gc")
    assert "0 folders" in fledge("gc")
    assert "everything is there" in fledge("run", recipe)


def test_wrong_input_is_one_message_in_both_languages(recipe: str) -> None:
    assert 'did you mean "run"?' in fledge("rnu", code=2)
    assert 'did you mean "words"?' in fledge("run", recipe, "--set", "wrds.count=1", code=2)
    assert "是不是想写“words”？" in fledge("run", recipe, "--set", "wrds.count=1", code=2, lang="zh")
    assert "there is no recipe nowhere.yaml" in fledge("run", "nowhere.yaml", code=2)
    assert 'did you mean "toy"?' in fledge("run", recipe) + fledge("show", "tyo", code=2)
    assert "neither a model folder nor a run" in fledge("chat", "nothing", code=2)
    assert "No such option" in fledge("run", "--nonsense", code=2)


def test_a_failing_stage_ends_with_its_own_status(recipe: str) -> None:
    output = fledge("run", recipe, "--set", "learn.fail=crash", code=1)
    assert "RuntimeError: something broke inside" in output and "log.txt" in output


def test_every_stage_is_a_command_and_its_fields_are_its_flags() -> None:
    stages = {use for use in all_stages() if not use.startswith("toy.")}
    assert {path.replace(" ", ".") for path in STAGES} == stages
    for path in STAGES:
        help_text = fledge(*path.split(), "--help")
        for field in all_stages()[path.replace(" ", ".")].model_fields:
            assert f"--{field.replace('_', '-')}" in help_text, f"{path} does not show {field}"


def test_doctor_says_what_is_there_and_what_brings_the_rest() -> None:
    output = fledge("doctor")
    assert "torch" in output and "Chromium".lower() in output.lower()
    assert "本机" in fledge("doctor", lang="zh")


def test_the_data_of_a_stage_may_be_named_without_a_flag() -> None:
    question = "Which of the seven bridges over the slow green river was the first that anybody crossed on horseback?"
    Path("corpus.jsonl").write_text(json.dumps({"text": f"Some say: {question}"}) + "\n", encoding="utf-8")
    Path("exam.jsonl").write_text(json.dumps({"id": "q7", "question": question}) + "\n", encoding="utf-8")
    fledge("data", "contamination", "corpus.jsonl", "--tasks", "exam.jsonl", "--out", "report")
    assert "q7" in Path("report/report.txt").read_text(encoding="utf-8")
    output = fledge("data", "contamination", "corpus.jsonl", "--data", "exam.jsonl", "--tasks", "exam.jsonl", code=2)
    assert "the data was named twice" in output
