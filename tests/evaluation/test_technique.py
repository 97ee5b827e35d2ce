"""Prompting techniques in an evaluation: of one task, of a whole stage, with tools, recorded in the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fledge.core.artifact import Artifact, Model, Prompts
from fledge.core.intervals import wilson
from fledge.evaluation.stages import Evaluate
from fledge.evaluation.subject import Subject
from fledge.evaluation.tasks.answer_match import AnswerMatch, matches
from fledge.records.kinds import Message, Prompt
from fledge.records.shards import ShardWriter
from tests.evaluation.fakes import LetterRenderer, job_for, letters
from tests.inference import tiny
from tests.inference.prompting.scripted import Scripted


def questions(folder: Path) -> dict[str, Artifact]:
    with ShardWriter(folder / "questions", "prompts") as out:
        out.write(Prompt((Message("user", "How many apples?"),), "18"))
        out.write(Prompt((Message("user", "有几个苹果？"),), "二十"))
    return {"questions": Prompts(folder / "questions")}


def subject(engine: Any, chat: bool = True) -> Subject:
    return Subject("a", engine, letters, LetterRenderer(), chat)  # type: ignore[arg-type]


def says(text: str, request: Any) -> str:
    if "Therefore" in text or "所以" in text:
        return "20个" if "所以" in text else "17"
    return "思考" if "苹果" in text else "thinking"


def test_answers_come_by_the_technique_and_keep_their_trace(tmp_path: Path) -> None:
    task = AnswerMatch.model_validate({"data": "questions", "technique": "cot", "match": "answer", "max_new_tokens": 9})
    rows = task.load(job_for(task, tmp_path / "job", questions(tmp_path)))
    engine, told = Scripted(says), list[int]()
    items = task.ask(rows, subject(engine), 7, told.append)
    assert [len(batch) for batch in engine.batches] == [2, 2] and told == [2]  # both questions, step by step
    assert [item["text"] for item in items] == ["17", "20"] and [item["right"] for item in items] == [False, True]
    assert [step["role"] for step in items[0]["technique"]["trace"]] == ["answer", "extract"]
    assert json.loads(json.dumps(items)) == items
    assert task.key == "answer_match_cot" and task.conclude(rows, {"a": items}, {}, 0).models["a"][task.key] == wilson(
        1, 2
    )
    assert {request.max_new_tokens for request in engine.asked} == {9} and {r.temperature for r in engine.asked} == {0}
    texts = Scripted(says)
    task.ask(rows, subject(texts, chat=False), 7, told.append)
    assert texts.asked[0].text == "Question: How many apples?\nAnswer: Let's think step by step."


def test_the_same_seed_draws_the_same_samples(tmp_path: Path) -> None:
    settings = {"use": "self_consistency", "samples": 3, "over": "direct"}
    task = AnswerMatch.model_validate({"data": "questions", "technique": settings})
    rows = task.load(job_for(task, tmp_path / "job", questions(tmp_path)))
    seeds = []
    for seed in (7, 7, 8):
        engine = Scripted(says)
        task.ask(rows, subject(engine), seed, lambda n: None)
        seeds.append([request.seed for request in engine.asked])
    assert seeds[0] == seeds[1] != seeds[2] and len(set(seeds[0])) == 6


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("So the answer is 18.", "18 dollars", True),
        ("答案是十八元", "18", True),
        ("18 or 19", "18", False),
        ("选Ｂ", "(b)", True),
        ("The answer is Hastings.", "hastings", True),
    ],
)
def test_answers_that_say_the_same(text: str, expected: str, right: bool) -> None:
    assert matches(text, expected, "answer") is right


def test_a_technique_of_the_stage_is_that_of_tasks_without_one() -> None:
    stage = Evaluate.model_validate(
        {
            "models": {"base": "base"},
            "technique": {"use": "self_consistency", "samples": 5},
            "tasks": [
                {"task": "answer_match", "data": "questions"},
                {"task": "answer_match", "data": "questions", "technique": "direct"},
                {"task": "samples", "prompts": ["你好"]},
            ],
        }
    )
    assert not list(stage.check())
    assert [task.key for task in stage.asked] == ["answer_match_self_consistency", "answer_match_direct", "samples"]
    once = stage.model_copy(update={"technique": None})
    assert sum(task.tokens() for task in stage.asked) > 5 * sum(task.tokens() for task in once.asked[:1])
    assert stage.config_values()["technique"]["samples"] == 5  # a part of the stage's identity


def test_what_cannot_be_is_said_before_anything_runs() -> None:
    config: dict[str, Any] = {
        "models": {"base": "base"},
        "technique": "cot",
        "tasks": [{"task": "samples", "prompts": ["a"]}],
    }
    assert "technique" in next(iter(Evaluate.model_validate(config).check())).what
    with pytest.raises(ValidationError, match='no technique "cott"; did you mean "cot"'):
        Evaluate.model_validate({**config, "technique": "cott"})
    config["tasks"] = [{"task": "answer_match", "data": "questions"}]
    react = {**config, "technique": {"use": "react", "tools": ["search", "telescope"]}}
    found = [problem.what for problem in Evaluate.model_validate(react).check()]
    assert len(found) == 2 and "search" in found[0] and "telescope" in found[1]
    config["tasks"] *= 2
    assert any("two tasks" in problem.what for problem in Evaluate.model_validate(config).check())


def test_the_scores_say_by_which_technique(tmp_path: Path) -> None:
    config = {
        "models": {"base": "base"},
        "technique": {"use": "self_consistency", "samples": 2, "over": "direct"},
        "tasks": [{"task": "answer_match", "data": "questions", "max_new_tokens": 4}],
    }
    stage = Evaluate.model_validate(config)
    inputs = {"base": Model(tiny.save(tmp_path / "base", tiny.llama())), **questions(tmp_path)}
    made = stage.run(job_for(stage, tmp_path / "a", inputs))
    scores = json.loads((made.path / "scores.json").read_text(encoding="utf-8"))
    assert scores["tasks"][0]["technique"]["samples"] == 2 and "base.answer_match_self_consistency" in made.metrics
    items = (made.path / "items" / "answer_match_self_consistency" / "base.jsonl").read_text(encoding="utf-8")
    assert json.loads(items.splitlines()[0])["technique"]["trace"][-1]["role"] == "vote"
    again = stage.run(job_for(stage, tmp_path / "b", inputs))
    assert (again.path / "items" / "answer_match_self_consistency" / "base.jsonl").read_text(encoding="utf-8") == items
