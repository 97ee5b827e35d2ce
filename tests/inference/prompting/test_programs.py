"""How programs are driven, alone and together; what a talk asks and keeps."""

from __future__ import annotations

import json

import pytest

from fledge.core.errors import FledgeError
from fledge.inference.engine import PromptTooLong, Request, Result
from fledge.inference.prompting import Question, Step, drive, technique, together
from fledge.inference.prompting.program import Program
from fledge.records.kinds import Message
from tests.inference.prompting.scripted import Scripted, told


def asks(*texts: str) -> Program[list[str]]:
    """A program that asks one question after another."""
    heard = []
    for text in texts:
        results = yield [Request(text=text)]
        heard.append(results[0].text)
    return heard


def test_programs_side_by_side_share_their_rounds() -> None:
    engine = Scripted(lambda text, _: text.upper())
    found = drive(engine, together([asks("a", "b", "c"), asks(), asks("d")]))
    assert found == [["A", "B", "C"], [], ["D"]]
    assert [[told(r) for r in batch] for batch in engine.batches] == [["a", "d"], ["b"], ["c"]]


def test_the_first_error_ends_all_and_closes_the_others() -> None:
    closed = []

    def open_ended() -> Program[None]:
        try:
            while True:
                yield [Request(text="x")]
        finally:
            closed.append(True)

    engine = Scripted(["y", FledgeError("broken")])
    with pytest.raises(FledgeError, match="broken"):
        drive(engine, together([open_ended(), asks("z")]))
    assert closed == [True]


def test_a_failing_step_is_named_and_keeps_its_kind() -> None:
    engine = Scripted(["thinking", PromptTooLong("too long")])
    with pytest.raises(PromptTooLong, match=r"step extract of cot.*too long"):
        technique("cot").run(engine, "1 + 1?")


def test_an_engine_that_fails_as_a_whole_fails_the_step() -> None:
    class Down:
        def generate(self, requests: list[Request]) -> list[Result]:
            raise FledgeError("no connection")

    with pytest.raises(FledgeError, match=r"step answer of direct.*no connection"):
        technique("direct").run(Down(), "hello")


def test_seeds_are_the_same_each_time_and_differ_between_requests() -> None:
    vote = technique({"use": "self_consistency", "samples": 4})
    runs = []
    for seed in (1, 1, 2):
        engine = Scripted(lambda text, _: "7")
        vote.run(engine, "How many?", seed=seed)
        runs.append([request.seed for request in engine.asked])
    assert runs[0] == runs[1] and not set(runs[0]) & set(runs[2])
    assert len(set(runs[0])) == 8
    assert all(seed is None for seed in _seeds(vote))


def _seeds(vote: object) -> list[int | None]:
    engine = Scripted(lambda text, _: "7")
    vote.run(engine, "How many?")  # type: ignore[attr-defined]
    return [request.seed for request in engine.asked]


def test_steps_are_heard_as_they_are_done_and_tokens_are_counted() -> None:
    heard: list[tuple[int, str]] = []
    engine = Scripted(["三加四等于七", "7"])
    outcome = technique("cot").run(
        engine, "3 + 4 是多少？", listen=lambda step: heard.append((len(engine.batches), step.role)), max_new_tokens=20
    )
    assert heard == [(1, "answer"), (2, "extract")]
    assert [step.completion_tokens for step in outcome.trace] == [6, 1] and outcome.completion_tokens == 7
    assert outcome.prompt_tokens == sum(step.prompt_tokens for step in outcome.trace) > 0
    assert {request.max_new_tokens for request in engine.asked} == {20}


def test_a_trace_is_json() -> None:
    outcome = technique({"use": "react"}).run(Scripted(["Action: calculator[6*7]", "Action: finish[42]"]), "6 × 7?")
    value = json.loads(json.dumps(outcome.to_json(), ensure_ascii=False))
    assert value["answer"] == "42" and [step["role"] for step in value["trace"]] == ["act", "tool", "act"]
    assert value["trace"][1] == {"role": "tool", "tool": "calculator", "answer": "6*7", "observation": "42"}
    assert value["trace"][0]["prompt"][0]["role"] == "user" and value["trace"][0]["finish"] == "stop"
    assert Step("check").to_json() == {"role": "check"}


def test_the_conversation_before_the_question_stays() -> None:
    engine = Scripted(["because", "5"])
    talk = (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "2+3?"),
    )
    technique("cot").run(engine, talk)
    assert engine.asked[0].messages[:3] == talk[:3]  # type: ignore[index]
    assert [m.role for m in engine.asked[1].messages] == ["system", "user", "assistant", "user", "assistant", "user"]  # type: ignore[union-attr]


def test_a_model_that_only_continues_reads_the_papers_form() -> None:
    engine = Scripted([" One and one are two.", " 2"])
    question = Question.of((Message("system", "Be brief."), Message("user", "1 + 1?")), chat=False)
    outcome = technique({"use": "cot", "answer": "number"}).run(engine, question)
    begin = "Be brief.\n\nQuestion: 1 + 1?\nAnswer: Let's think step by step."
    assert [request.text for request in engine.asked] == [
        begin, begin + " One and one are two.\nTherefore, the answer (arabic numerals) is"
    ]  # fmt: skip
    assert engine.asked[0].stop == ("\nQuestion:",) and outcome.answer == "2"
    engine = Scripted(["7。"])
    technique("direct").run(engine, Question.of("3 加 4 是多少？", chat=False))
    assert engine.asked[0].text == "问题：3 加 4 是多少？\n回答：" and engine.asked[0].stop == ("\n问题：",)


@pytest.mark.parametrize("bad", ["", "  ", (), (Message("assistant", "hi"),)])
def test_nothing_to_answer(bad: object) -> None:
    with pytest.raises(FledgeError, match="needs a question"):
        technique("direct").run(Scripted([]), bad)  # type: ignore[arg-type]
