"""A file of prompts: answers in order, bad lines named, counted and harmless."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from fledge.inference import batch
from fledge.inference.native import NativeEngine

LINES = [
    '{"prompt": "Hello", "id": "a"}',
    "",
    "{not json",
    '{"messages": [{"role": "user", "content": "你好"}], "max_tokens": 3, "n": 2}',
    '{"prompt": "x", "temprature": 1}',
    '{"prompt": "x", "temperature": "hot", "id": 7}',
    '{"max_tokens": 3}',
    '{"prompt": ""}',
    "[1]",
    '{"prompt": "bye", "logprobs": 0, "temperature": 0}',
]


@pytest.mark.parametrize("window", [256, 2])
def test_a_file_with_bad_lines(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(batch, "_WINDOW", window)
    out, seen = io.StringIO(), []
    assert batch.generate_file(engine, LINES, out, {"max_tokens": 5, "temperature": 0}, seen.append) == 6
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.getvalue().splitlines()]
    assert seen[-1] == batch.Counts(lines=9, answered=3, failed=6, tokens=5 + 2 * 3 + 5)
    assert rows[0]["id"] == "a" and rows[0]["completion_tokens"] == 5 and isinstance(rows[0]["text"], str)
    assert [row.get("line") for row in rows] == [None, 3, None, 5, 6, 7, 8, 9, None]
    assert len(rows[2]["texts"]) == 2
    assert 'did you mean "temperature"' in rows[3]["error"]
    assert "temperature" in rows[4]["error"] and "hot" in rows[4]["error"] and rows[4]["id"] == 7
    assert "exactly one" in rows[5]["error"] and "empty" in rows[6]["error"]
    assert len(rows[8]["logprobs"]) == 5


BAD = {
    "too long": ({"prompt": "你" * 200}, "600 tokens"),
    "empty": ({"prompt": ""}, "empty"),
    "no tokens asked": ({"prompt": "a", "max_tokens": 0}, "max_tokens: must be at least 1"),
    "no schema": ({"prompt": "a", "guided_json": {"type": "strang"}}, "strang"),
    "no expression": ({"prompt": "a", "guided_regex": "a("}, "regular expression"),
    "a bias for nobody": ({"prompt": "a", "logit_bias": {"330": 1.0}}, "logit_bias: a token id is outside"),
    "a bias of nothing": ({"prompt": "a", "logit_bias": {"5": float("nan")}}, "logit_bias is out of range"),
    "no temperature": ({"prompt": "a", "temperature": float("nan")}, "temperature"),
    "no role": ({"messages": [{"role": "robot", "content": "a"}]}, "is not one of the values allowed here"),
}


def test_bad_lines_change_no_answer_of_the_others(engine: NativeEngine) -> None:
    good = [{"prompt": f"how {n}", "max_tokens": 9, "temperature": 0} for n in range(len(BAD))]
    mixed = [line for pair in zip(good, (line for line, _ in BAD.values()), strict=True) for line in pair]
    alone, together = io.StringIO(), io.StringIO()
    assert batch.generate_file(engine, map(json.dumps, good), alone) == 0
    assert batch.generate_file(engine, map(json.dumps, mixed), together) == len(BAD)
    rows = together.getvalue().splitlines()
    assert rows[::2] == alone.getvalue().splitlines()
    for row, (name, (_, says)) in zip(rows[1::2], BAD.items(), strict=True):
        assert says in json.loads(row)["error"], name


def test_what_is_wrong_is_said_in_chinese(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_LANG", "zh")
    out = io.StringIO()
    batch.generate_file(engine, ['{"prompt": "a", "max_tokens": 0}', '{"prompt": 3}'], out)
    assert ["不能小于 1" in out.getvalue(), "必须是文本" in out.getvalue()] == [True, True]


def test_the_order_and_texts_are_those_of_the_engine(engine: NativeEngine) -> None:
    prompts = [f"prompt {n}" for n in range(7)]
    lines = [json.dumps({"prompt": prompt, "seed": 4, "max_tokens": n + 1}) for n, prompt in enumerate(prompts)]
    one, two = io.StringIO(), io.StringIO()
    batch.generate_file(engine, lines, one)
    batch.generate_file(engine, lines, two)
    assert one.getvalue() == two.getvalue()
    assert [json.loads(row)["completion_tokens"] for row in one.getvalue().splitlines()] == list(range(1, 8))
