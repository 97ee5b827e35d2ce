"""Every technique with a real (tiny, random) model: it ends, its trace is whole, and a seed repeats it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fledge.inference.native import NativeEngine
from fledge.inference.prompting import Question, drive, technique, together

SETTINGS: list[dict[str, Any]] = [
    {"use": "direct"},
    {"use": "role", "role": "a teacher", "over": "cot"},
    {"use": "template", "text": "Q: {question}"},
    {"use": "few_shot", "examples": [{"question": "1", "answer": "2"}]},
    {"use": "plan_and_solve"},
    {"use": "self_consistency", "samples": 3, "over": "direct"},
    {"use": "least_to_most", "most": 2, "over": "direct"},
    {"use": "reflexion", "attempts": 2, "over": "direct"},
    {"use": "react", "steps": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda value: value["use"])
@pytest.mark.parametrize("text", ["How many?", "几个？"])
def test_a_run_ends_and_repeats(roomy: NativeEngine, settings: dict[str, Any], text: str) -> None:
    made = technique(settings)
    first = made.run(roomy, text, max_new_tokens=6, temperature=1.0, seed=11)
    again = made.run(roomy, text, max_new_tokens=6, temperature=1.0, seed=11)
    assert first == again and json.loads(json.dumps(first.to_json()))["trace"]
    assert 0 < first.completion_tokens <= 6 * sum(bool(step.finish) for step in first.trace)


@pytest.mark.parametrize("use", ["tree_of_thoughts", "skeleton_of_thought"])
def test_long_prompts(roomy: NativeEngine, use: str) -> None:
    more = {"depth": 1, "thoughts": 2} if use == "tree_of_thoughts" else {"most": 2}
    outcome = technique({"use": use, **more}).run(roomy, "几个？", max_new_tokens=4, seed=1)
    assert outcome.trace and outcome.prompt_tokens > 0


def test_side_by_side_gives_what_alone_gives(roomy: NativeEngine) -> None:
    made = technique({"use": "cot"})
    questions = ["How many?", "几个？", "And a longer question, with more words in it?"]
    from fledge.inference.engine import Request

    base = Request(text="-", temperature=0.0, max_new_tokens=5)
    alone = [drive(roomy, made.solving(question, base)) for question in questions]
    assert drive(roomy, together([made.solving(question, base) for question in questions])) == alone


def test_a_text_model(roomy: NativeEngine) -> None:
    outcome = technique("cot").run(roomy, Question.of("几个？", chat=False), max_new_tokens=4)
    assert [type(step.prompt) for step in outcome.trace] == [str, str]


def test_json_is_held_by_the_decoder(roomy: NativeEngine) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    made = technique({"use": "format", "kind": "json_schema", "value": schema})
    outcome = made.run(roomy, "几个？", max_new_tokens=60, temperature=1.0, seed=4)
    assert json.loads(outcome.answer)["n"] in (1, 2, 3)
    options = technique({"use": "format", "kind": "options", "value": ["正面", "负面 (-)"], "over": "direct"})
    assert options.run(roomy, "好不好？", max_new_tokens=30, temperature=1.0, seed=4).answer in ("正面", "负面 (-)")
