"""An index in an evaluation: the same questions without it and with it, in English and Chinese."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fledge.core.artifact import Artifact
from fledge.core.stage import stage_class
from fledge.evaluation.subject import Subject
from fledge.evaluation.tasks.answer_match import AnswerMatch
from fledge.inference.retrieval.index import Index
from tests.evaluation.fakes import job_for
from tests.inference.retrieval.library import Reader
from tests.inference.retrieval.test_retriever import QUESTIONS


def asked(task: AnswerMatch, index: Index, folder: Path) -> list[dict[str, Any]]:
    file = folder / "questions.jsonl"
    rows = [{"prompt": question.text, "answer": question.answers[0]} for question in QUESTIONS]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    inputs = {"questions": Artifact(file), "notes": Artifact(index.folder)}
    renderer: Any = SimpleNamespace(template="chat")
    subject = Subject("reader", Reader(), None, renderer)  # type: ignore[arg-type]
    return task.ask(task.load(job_for(task, folder, inputs)), subject, 0, lambda more: None)


def test_retrieval_as_a_technique_is_right_where_the_model_alone_is_not(index: Index, tmp_path: Path) -> None:
    plain = {"task": "answer_match", "data": "questions"}
    technique = {"use": "retrieval", "k": 3}
    alone = asked(AnswerMatch.model_validate(plain | {"technique": "direct"}), index, tmp_path)
    found = asked(AnswerMatch.model_validate(plain | {"index": "notes", "technique": technique}), index, tmp_path)
    assert not any(item["right"] for item in alone)
    assert all(item["right"] for item in found)
    assert all([step["role"] for step in item["technique"]["trace"]] == ["search", "answer"] for item in found)


def test_a_recipe_refers_to_the_stage_that_made_the_index() -> None:
    task = {"task": "answer_match", "data": "questions", "index": "notes", "technique": {"use": "retrieval"}}
    stage = stage_class("evaluate").model_validate({"models": {"a": "base"}, "tasks": [task]})
    assert {ref.text: ref.expects for ref in stage.references().values()}["notes"] == "index"
    assert not list(stage.check())
    missing = stage_class("evaluate").model_validate({"models": {"a": "base"}, "tasks": [task | {"index": None}]})
    assert ["search" in problem.what for problem in missing.check()] == [True]
