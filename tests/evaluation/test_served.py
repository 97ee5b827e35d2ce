"""Models that a server answers for, examined beside models of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fledge.core.artifact import Artifact, Model, Prompts
from fledge.core.errors import FledgeError
from fledge.evaluation.side_by_side import side_by_side
from fledge.evaluation.stages import Evaluate
from fledge.inference.opening import open_engine
from fledge.records.kinds import Message, Prompt
from fledge.records.shards import ShardWriter
from fledge.serving.app import create_app
from tests.evaluation.fakes import job_for
from tests.inference import tiny
from tests.inference.engines.scripted import events, models, reply, scripted
from tests.serving.conftest import running

ASKED = {
    "tasks": [
        {"task": "answer_match", "data": "questions", "max_new_tokens": 12},
        {"task": "answer_match", "data": "questions", "max_new_tokens": 12, "technique": "cot"},
        {"task": "samples", "prompts": ["Hello", "你好"], "max_new_tokens": 9},
    ]
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("served")
    with ShardWriter(folder / "questions", "prompts") as out:
        out.write(Prompt((Message("user", "How many apples?"),), "18"))
        out.write(Prompt((Message("user", "有几个苹果？"),), "二十"))
    return {"base": Model(tiny.save(folder / "base", tiny.llama())), "questions": Prompts(folder / "questions")}


def run(config: dict[str, Any], folder: Path, inputs: dict[str, Artifact]) -> tuple[Any, dict[str, Any]]:
    stage = Evaluate.model_validate({**ASKED, **config})
    assert not list(stage.check())
    made = stage.run(job_for(stage, folder, inputs))
    return made, json.loads((made.path / "scores.json").read_text(encoding="utf-8"))


def test_a_server_of_the_same_model_gives_the_same_answers(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with open_engine(inputs["base"].path, "float32", "cpu") as engine, running(create_app({"tiny": engine})) as url:
        config = {"models": {"here": "base"}, "served": {"there": f"{url}#tiny", "text": url}, "completes": ["text"]}
        made, scores = run(config, tmp_path, inputs)
    for task in ("answer_match", "answer_match_cot", "samples"):
        here, there, text = ((made.path / "items" / task / f"{name}.jsonl").read_text(encoding="utf-8")
                             for name in ("here", "there", "text"))  # fmt: skip
        assert here == there != text
    assert scores["models"]["there"]["address"].endswith("#tiny") and "parameters" in scores["models"]["here"]
    assert "there.parameters" not in made.metrics and made.metrics["there.answer_match"] == 0
    pairs = [(row["model"], row["against"]) for row in scores["tasks"][0]["comparisons"]]
    assert ("there", "here") in pairs


def test_a_server_is_asked_in_its_own_words(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    def answer(handler: Any, body: Any) -> None:
        text = "十八个" if "apples" in body["messages"][-1]["content"] else "答案是２０。"
        events({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]})(handler, body)

    tasks = [{"task": "answer_match", "data": "questions", "match": "answer"}]
    with scripted(v1_models=models(), v1_chat_completions=answer) as script:
        made, _ = run({"served": {"gpt": script.url}, "tasks": tasks}, tmp_path, inputs)
    assert made.metrics["gpt.answer_match"] == 1
    assert all(body["temperature"] == 0 and body["model"] == "m" for body in script.bodies("/v1/chat/completions"))
    broken = {"v1_models": models(), "v1_chat_completions": reply({"error": "out of memory"}, 500)}
    with scripted(**broken) as script, pytest.raises(FledgeError, match="out of memory"):
        run({"served": {"gpt": script.url}, "tasks": tasks}, tmp_path / "broken", inputs)


def test_the_table_has_no_size_for_it() -> None:
    class Run:
        def scores(self) -> list[Any]:
            row = {"kind": "model", "chat": True, "address": "http://x", "metrics": {"answer_match": 0.5}}
            task = {"key": "answer_match", "task": "answer_match", "baselines": {}}
            return [{"models": {"gpt": row}, "tasks": [task]}]

        def made_by(self, use: str) -> list[Any]:
            return []

    (row,) = side_by_side(Run()).rows  # type: ignore[arg-type]
    assert row.name.en == "gpt" and list(row.cells) == ["answer_match"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"served": {"a": "gpu:8000"}}, "no address"),
        ({"served": {"base": "http://a"}, "models": {"base": "base"}}, 'called "base"'),
        ({}, "no model"),
        ({"served": {"a": "http://a"}, "tasks": [{"task": "answer_loss", "data": "talk"}]}, "answer_loss reads prob"),
        ({"served": {"a": "http://a"}, "completes": ["b"]}, "completes"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(config: dict[str, Any], says: str) -> None:
    problems = list(Evaluate.model_validate({**ASKED, **config}).check())
    assert len(problems) == 1 and says in str(FledgeError(*problems))
