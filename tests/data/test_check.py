"""The step `check`: a contract that every sample keeps."""

from __future__ import annotations

from typing import Any

import pytest

from fledge.data.stages import Refine
from fledge.data.steps import Rejected, read_step
from fledge.records.kinds import Answer, Conversation, Document, Labelled, Message, Preference, Prompt, Record
from fledge.records.rejects import read_rejects

from .conftest import Runner, talk, through, write


def verdicts(records: list[Record], **options: Any) -> list[str]:
    """The reason and value of each record, "" where it is kept."""
    kept = through(read_step({"check": options}), records)
    for result, record in zip(kept, records, strict=True):
        assert isinstance(result, Rejected) or result == record, "a check changes nothing"
    return [f"{r.reason}: {r.value}" if isinstance(r, Rejected) else "" for r in kept]


def test_nothing_is_asked_by_itself() -> None:
    assert verdicts([talk(""), talk("a", "b", "c")]) == ["", ""]


def test_languages_declared_or_found() -> None:
    rows: list[Record] = [
        Document("The river is wide and the old bridge is made of stone."),
        Document("这条河很宽，桥是石头做的。"),
        Document("1234", language="fr"),
        Document("1234"),
    ]
    assert verdicts(rows, languages=["zh", "fr"]) == [
        "language not allowed: en", "", "", "language not allowed: und",
    ]  # fmt: skip


def test_labels_in_the_set() -> None:
    rows: list[Record] = [Labelled("t", "正面"), Labelled("t", "neutral")]
    assert verdicts(rows, labels=["正面", "负面"]) == ["", "label not allowed: neutral"]


def test_lengths_in_units_and_in_characters() -> None:
    rows: list[Record] = [Document("one two three"), Document("一二三四五六七")]
    assert verdicts(rows, min_length=4, max_length=6) == ["too short: 3 < 4 units", "too long: 7 > 6 units"]
    assert verdicts(rows, min_length=3, max_length=7) == ["", ""]
    assert verdicts(rows, min_length=8, length_in="characters") == ["", "too short: 7 < 8 characters"]


def test_answers_are_there() -> None:
    call = Message("assistant", "", tool_calls="[]x")
    rows: list[Record] = [
        talk("q", "a"), talk("q"), talk("q", " "), Conversation((Message("user", "q"), call)),
    ]  # fmt: skip
    assert verdicts(rows, rules=["answer"]) == ["", "answer missing: answer none", "answer missing: answer 0", ""]
    prompts: list[Record] = [Prompt((Message("user", "1+1"),), "2"), Prompt((Message("user", "1+1"),))]
    assert verdicts(prompts, rules=["answer"]) == ["", "answer missing: answer"]
    ranked: list[Record] = [Preference((Message("user", "q"),), (Answer("a", 1), Answer("", 2)))]
    assert verdicts(ranked, rules=["answer"]) == ["answer missing: answer 1"]


def test_turns_alternate_and_end_with_an_answer() -> None:
    u, a = Message("user", "q"), Message("assistant", "a")
    system, call, result = Message("system", "s"), Message("assistant", "", tool_calls="[1]"), Message("tool", "42")
    rows: list[Record] = [Conversation(turns) for turns in (
        (u, a, u, a), (system, u, a), (u, u, a), (a, u), (u, call, result, a), (u, call, result, result, a, u, a),
        (u, a, a), (u, a, u),
    )]  # fmt: skip
    said = [v.partition(":")[0] for v in verdicts(rows, rules=["alternate"])]
    broken = "turns do not alternate"
    assert said == ["", "", broken, broken, "", "", broken, ""]
    assert verdicts([rows[2]], rules=["alternate"]) == [f"{broken}: user user assistant"]
    assert [bool(v) for v in verdicts(rows, rules=["ends_with_answer"])] == [False] * 3 + [True] + [False] * 3 + [True]
    assert verdicts(rows[:2], rules=["system"]) == ["system prompt missing: none", ""]
    assert verdicts(rows[:2], rules=["no_system"]) == ["", "has a system prompt: system"]


def test_one_answer_is_the_best() -> None:
    rows: list[Record] = [
        Preference((Message("user", "q"),), (Answer("a", 1), Answer("b", 2), Answer("c", 2))),
        Preference((Message("user", "q"),), (Answer("a", 1), Answer("b", 1))),
    ]
    assert verdicts(rows, rules=["best"]) == ["", "no single best answer: ranks 1 1"]


def test_patterns_and_sources() -> None:
    rows: list[Record] = [Document("第一条 本法"), Document("As an AI model, I cannot", source="web")]
    assert verdicts(rows, must_match="第.条") == ["", "required pattern missing: 第.条"]
    assert verdicts(rows, must_not_match="(?i)as an ai") == ["", "forbidden pattern found: As an AI"]
    assert verdicts(rows, rules=["source"]) == ["source missing: ", ""]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 3, "min_length": 5}, "max_length 3 is below min_length 5"),
        ({"must_match": "("}, "is not a regular expression"),
        ({"rules": ["answers"]}, "answer"),
        ({"rules": ["system", "no_system"]}, "exclude each other"),
        ({"language": ["zh"]}, "languages"),
    ],
)
def test_a_contract_that_cannot_be_kept_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_step({"check": options})


def test_in_the_refinery_what_breaks_it_is_kept_with_its_value(run: Runner, tmp_path: Any) -> None:
    data = write(tmp_path / "a", [talk("q", "a", id="1"), talk("q", "q2", "a", "b", "c", id="2")])
    out = run(Refine(data="a", steps=[{"check": {"max_length": 4}}]), {"a": data})
    (row,) = read_rejects(out.path)
    assert (row["step"], row["reason"], row["value"]) == ("check", "too long", "5 > 4 units")
