"""Answers from passages: what the model is shown, what it cites, what it may leave open, and what it is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.core.errors import FledgeError
from fledge.core.intervals import mcnemar
from fledge.inference.engine import PromptTooLong
from fledge.inference.native import NativeEngine
from fledge.inference.prompting import drive, technique
from fledge.inference.retrieval.answering import Answer, GroundedPrompt, RetrievalAugmented
from fledge.inference.retrieval.index import Index
from fledge.inference.retrieval.measure import Question, compare, read_questions, verdict
from fledge.inference.retrieval.reading import Passage
from fledge.inference.retrieval.retriever import Retriever
from fledge.inference.retrieval.wording import abstains
from tests.inference.retrieval.library import Reader
from tests.inference.retrieval.test_retriever import QUESTIONS

UNANSWERABLE = [Question("What is the capital of Mongolia called?"), Question("蒙古国的首都叫什么？")]


def test_an_answer_stands_on_numbered_passages_in_the_questions_language(by_words: Retriever) -> None:
    engine = Reader()
    english, chinese = RetrievalAugmented(engine, by_words).answer_all(
        ["By whom is the boiler repaired?", "差旅费由谁审核？"]
    )
    assert "harbour workshop" in english.text and "财务部" in chinese.text
    for answer, source in ((english, "guide.md"), (chinese, "handbook.md")):
        assert answer.problems == [] and not answer.abstained
        assert answer.sources[0].startswith(f"[1] {source}#L")
        assert answer.claims[0].support == 1.0
    first, second = engine.prompts
    assert "[1] guide.md#L" in first and "Question: By whom is the boiler repaired?" in first
    assert first.index("[1] ") < first.index("[2] ") < first.index("Question: ")
    assert "资料：\n[1] handbook.md#L" in second and "问题：差旅费由谁审核？" in second
    assert "Question" not in second and "问题" not in first


def test_nothing_found_is_answered_without_the_model_and_streams_alike(by_words: Retriever) -> None:
    engine = Reader()
    assistant = RetrievalAugmented(engine, by_words)
    answer = assistant.answer("qqqq?")
    assert answer.abstained and not answer.asked and engine.prompts == []
    heard: list[str] = []
    streamed = assistant.answer("By whom is the boiler repaired?", heard.append)
    assert "".join(heard).strip() == streamed.text == assistant.answer("By whom is the boiler repaired?").text
    heard.clear()
    assert assistant.answer("龘龘？", heard.append).text == "".join(heard) == "资料中没有答案。"


def test_abstaining_may_be_forbidden(by_words: Retriever) -> None:
    closed = GroundedPrompt.of("谁？", (), abstain=False)
    assert "没有答案" not in closed.instruction + closed.body
    assert "Not in the sources" not in GroundedPrompt.of("Who?", (Passage("x", "a"),), abstain=False).instruction
    assert "Not in the sources" in GroundedPrompt.of("Who?", (Passage("x", "a"),)).instruction
    answer = RetrievalAugmented(Reader(), by_words, abstain=False).answer("qqqq?")
    assert answer.asked and answer.text == "42."


def test_passages_are_left_out_until_the_prompt_fits(by_words: Retriever) -> None:
    question = "By whom is the boiler repaired?"
    whole = RetrievalAugmented(Reader(), by_words, k=4).prepare(question)[1]
    fitting = RetrievalAugmented(Reader(context=1100), by_words, k=4, max_new_tokens=100).prepare(question)[1]
    assert 0 < len(fitting) < len(whole) and fitting == whole[: len(fitting)]
    with pytest.raises(PromptTooLong):
        RetrievalAugmented(Reader(context=60), by_words).prepare(question)


def test_a_model_without_a_chat_template_is_asked_in_plain_text(by_words: Retriever) -> None:
    engine = Reader(chat=False)
    answer = RetrievalAugmented(engine, by_words).answer("每位读者最多借几本书？")
    assert "五本" in answer.text and engine.prompts[0].endswith("\n回答：")


def test_what_is_wrong_with_an_answer_is_said() -> None:
    passages = (Passage("The boiler was built in 1987.", "guide.md", "L5"),)
    answer = Answer("When?", 'In 1987 [1], "built by robots" [2].', passages)
    assert answer.shown == 'In 1987 [1], "built by robots" [2?].'
    assert [line.split(":")[0] for line in answer.problems] == [
        "there is no passage [2]",
        "not in the passages word for word",
    ]
    assert Answer("When?", "In 1987.", passages).problems == ["the answer cites none of the passages"]
    assert Answer("When?", "Not in the sources.", passages).problems == []
    assert answer.sources == ["[1] guide.md#L5"]
    assert abstains("Sorry: not in  the sources!") and abstains("资料中没有答案") and not abstains("In the sources.")


def test_with_and_without_sources_are_measured_on_the_same_questions(by_words: Retriever) -> None:
    questions = [*QUESTIONS, *UNANSWERABLE]
    found = compare(RetrievalAugmented(Reader(), by_words, k=3), questions)
    right = [v == "right" for v in found.with_sources.verdicts]
    assert right == [True] * len(QUESTIONS) + right[-2:] and found.closed.verdicts[:6] == ("open",) * 6
    assert found.recall == 1.0
    only = sum(a and b != "right" for a, b in zip(right, found.closed.verdicts, strict=True))
    reverse = sum(not a and b == "right" for a, b in zip(right, found.closed.verdicts, strict=True))
    assert found.gain.value == pytest.approx((only - reverse) / 8)
    assert found.p_value == mcnemar(only, reverse)
    assert json.loads(json.dumps(found.to_json()))["questions"] == 8


def test_a_model_that_may_not_abstain_makes_things_up_without_sources(by_words: Retriever) -> None:
    found = compare(RetrievalAugmented(Reader(), by_words, k=3, abstain=False), QUESTIONS)
    assert found.closed.made_up.value == 1.0 and found.with_sources.made_up.value == 0.0
    assert found.gain.above(0) and found.p_value < 0.05


def test_verdicts_and_the_file_of_questions(tmp_path: Path) -> None:
    question = Question("?", ("harbour workshop", "船坞"))
    assert [verdict(question, a) for a in ("HARBOUR  workshop!", "是船坞。", "robots", "Not in the sources.")] == [
        "right", "right", "made up", "open"
    ]  # fmt: skip
    assert verdict(Question("?"), "资料中没有答案。") == "right" and verdict(Question("?"), "robots") == "made up"
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n\n{"question": "问", "answers": ["答"], "sources": ["x"]}\n')
    assert read_questions(file) == [Question("a", ("b",)), Question("问", ("答",), ("x",))]
    for wrong, said in (('{"answer": 1}\n', "no question"), ("", "no questions"), ("[1]\n", "no question")):
        file.write_text(wrong)
        with pytest.raises(FledgeError, match=said):
            read_questions(file)


def test_the_technique_answers_cites_and_keeps_its_trace(index: Index) -> None:
    engine = Reader()
    made = technique({"use": "retrieval", "index": str(index.folder), "k": 2})
    for question, wanted in (("By whom is the boiler repaired?", "harbour workshop"), ("差旅费由谁审核？", "财务部")):
        outcome = made.run(engine, question)
        assert wanted in outcome.answer and "[1]" not in outcome.answer and "[1]" in outcome.text
        assert [step.role for step in outcome.trace] == ["search", "answer"]
        assert outcome.trace[0].observation.split("#")[0] in ("guide.md", "handbook.md")
    nothing = made.run(engine, "qqqq?")
    assert nothing.answer == "Not in the sources." and [step.role for step in nothing.trace] == ["search"]
    with pytest.raises(FledgeError, match="this is no index"):
        technique({"use": "retrieval", "index": str(index.folder / "none")}).run(engine, "a?")


def test_the_technique_leaves_out_passages_that_a_small_context_cannot_hold(index: Index, engine: NativeEngine) -> None:
    made = technique({"use": "retrieval", "index": str(index.folder), "k": 3})
    outcome = drive(engine, made.solving("boiler garden museum 博物馆"))
    asked = next(step for step in outcome.trace if step.role == "answer")
    assert asked.prompt_tokens < engine.context
