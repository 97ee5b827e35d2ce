"""Every technique against an engine with a script: what it asks, in both languages, and what it makes of answers."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest

from fledge.core.errors import FledgeError
from fledge.inference.engine import Constraint
from fledge.inference.prompting import TECHNIQUES, Question, Solution, technique
from fledge.inference.prompting.wordings import say
from fledge.records.kinds import Message
from tests.inference.prompting.scripted import Scripted, told

APPLES = "小明有15个苹果，给了小红3个，又买了8个，现在有多少个？"
SHOTS = [
    {"question": "5 + 2?", "reasoning": "Five and two more is seven.", "answer": "7"},
    {"question": "三加一？", "reasoning": "三再加一是四。", "answer": "4"},
]


def test_a_role_stands_in_the_system_message() -> None:
    engine = Scripted(["好的"])
    role = {
        "use": "role",
        "role": "一位耐心的数学老师",
        "traits": ["说话简短"],
        "principles": ["先列式", "再计算"],
        "output": "只写数字",
    }
    technique(role).run(engine, (Message("system", "请用中文。"), Message("user", APPLES)))
    system = engine.asked[0].messages[0].content  # type: ignore[index]
    assert system == (
        "请用中文。\n\n你是一位耐心的数学老师。\n\n你的特点：\n1. 说话简短\n\n"
        "回答问题时，请遵循以下原则：\n1. 先列式\n2. 再计算\n\n输出格式要求：\n只写数字"
    )
    assert engine.asked[0].messages[-1].content == APPLES  # type: ignore[index]


def test_a_template_is_filled_and_checked() -> None:
    engine = Scripted(["Bonjour"])
    template = {
        "use": "template",
        "text": "Translate into {language}: {{{question}}}",
        "values": {"language": "French"},
    }
    technique(template).run(engine, "Hello {x}")
    assert told(engine.asked[0]) == "Translate into French: {Hello {x}}"
    for text, values, what in (
        ("Translate", {}, "no place for the question"),
        ("{question} {name}", {}, "differ: name"),
        ("{question}", {"left": "over"}, "differ: left"),
        ("{question} }", {}, "cannot be read"),
        ("{question:>999999999}", {}, "cannot be read"),
        ("{question} {question.__class__}", {"question.__class__": ""}, "cannot be read"),
    ):
        with pytest.raises(FledgeError, match=what):
            technique({"use": "template", "text": text, "values": values})


def test_a_format_goes_to_the_decoder_and_is_checked() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    engine = Scripted(['{"age": 3}'])
    outcome = technique({"use": "format", "kind": "json_schema", "value": schema}).run(engine, "How old is Tom?")
    assert engine.asked[0].constraint == Constraint("json_schema", json.dumps(schema))
    assert json.dumps(schema) in told(engine.asked[0]) and outcome.answer == '{"age": 3}'
    with pytest.raises(FledgeError, match="does not have the form"):
        technique({"use": "format"}).run(Scripted(['{"age": ']), "How old is Tom?")
    options = {"use": "format", "kind": "options", "value": ["正面", "负面 (-)"]}
    engine = Scripted(["正面"])
    technique(options).run(engine, "这部电影好极了")
    assert engine.asked[0].constraint == Constraint("regex", r"(正面|负面 \(\-\))")
    with pytest.raises(FledgeError, match="does not have the form"):
        technique(options).run(Scripted(["中性"]), "这部电影好极了")
    for wrong in ({"kind": "regex"}, {"kind": "json_schema", "value": []}, {"kind": "options", "value": "a"}):
        with pytest.raises(FledgeError, match="does not go with its kind"):
            technique({"use": "format", **wrong})


def test_thinking_first_and_the_form_last() -> None:
    engine = Scripted(["Tom is 3, as his mother said.", "3", '{"age": 3}'])
    outcome = technique({"use": "format", "over": {"use": "cot"}}).run(engine, "How old is Tom?")
    assert [request.constraint for request in engine.asked] == [None, None, Constraint("json", "")]
    assert outcome.answer == '{"age": 3}' and engine.asked[2].messages[1].role == "assistant"  # type: ignore[index]


def test_few_shots_as_turns_and_as_text() -> None:
    shots = [
        {"question": "今天天气很好。", "answer": "The weather is nice today."},
        {"question": "我喜欢读书。", "answer": "I like reading."},
    ]
    engine = Scripted(["It is complicated.", "It is complicated."])
    technique({"use": "few_shot", "examples": shots, "task": "译成英文"}).run(engine, "这很复杂。")
    roles = [message.role for message in engine.asked[0].messages]  # type: ignore[union-attr]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert engine.asked[0].messages[0].content == "任务：译成英文"  # type: ignore[index]
    technique({"use": "few_shot", "examples": shots, "task": "译成英文", "layout": "text"}).run(engine, "这很复杂。")
    assert told(engine.asked[1]) == (
        "任务：译成英文\n\n示例1：\n输入：今天天气很好。\n输出：The weather is nice today.\n\n"
        "示例2：\n输入：我喜欢读书。\n输出：I like reading.\n\n现在请处理：\n输入：这很复杂。\n输出："
    )


def test_zero_shot_chain_of_thought_takes_two_steps() -> None:
    engine = Scripted(["15 - 3 = 12，12 + 8 = 20。", "20个"])
    outcome = technique("cot").run(engine, APPLES)
    assert told(engine.asked[0]) == f"{APPLES}\n\n让我们一步一步地思考。"
    assert [m.role for m in engine.asked[1].messages] == ["user", "assistant", "user"]  # type: ignore[union-attr]
    assert (outcome.answer, outcome.text) == ("20", "15 - 3 = 12，12 + 8 = 20。")
    english = Scripted(["...", "20"])
    technique("cot").run(english, "How many?")
    assert told(english.asked[0]) == "How many?\n\nLet's think step by step."


def test_few_shot_chain_of_thought_reads_the_taught_sentence() -> None:
    engine = Scripted(["Two and two more is four. So the answer is 4."])
    outcome = technique({"use": "cot", "examples": SHOTS}).run(engine, "2 + 2?")
    contents = [message.content for message in engine.asked[0].messages]  # type: ignore[union-attr]
    assert contents == [
        "5 + 2?", "Five and two more is seven. So the answer is 7.", "三加一？", "三再加一是四。所以答案是4。", "2 + 2?"
    ]  # fmt: skip
    assert outcome.answer == "4" and len(engine.asked) == 1
    forgot = Scripted(["Two and two is four.", "4"])
    assert technique({"use": "cot", "examples": SHOTS}).run(forgot, "2 + 2?").answer == "4" and not forgot.left


def test_plan_and_solve() -> None:
    engine = Scripted(["计划：先减后加。12，20。", "20"])
    outcome = technique({"use": "plan_and_solve", "answer": "number"}).run(engine, APPLES)
    assert told(engine.asked[0]).startswith(f"{APPLES}\n\n我们先理解题意") and "阿拉伯数字" in told(engine.asked[1])
    assert outcome.answer == "20"


def test_least_to_most_answers_each_part_with_those_before_it() -> None:
    parts = "1. 给了小红之后剩几个？\n2. 又买了之后有几个？"
    engine = Scripted([parts, "12个", "20个", "所以答案是20。"])
    outcome = technique("least_to_most").run(engine, APPLES)
    first, second, whole = map(told, engine.asked[1:])
    assert first == f"{APPLES}\n\n给了小红之后剩几个？"
    assert second == f"{APPLES}\n\n问题：给了小红之后剩几个？\n回答：12个\n\n又买了之后有几个？"
    assert whole.endswith(f"问题：又买了之后有几个？\n回答：20个\n\n{APPLES}")
    assert outcome.answer == "20" and [step.branch for step in outcome.trace] == ["", "part 1", "part 2", "whole"]


def test_a_skeletons_points_are_written_in_one_batch() -> None:
    engine = Scripted(["1. 起因：\n2. 经过\n3. 结果", "甲。", "乙。", "丙。"])
    outcome = technique("skeleton_of_thought").run(engine, "赤壁之战是怎么回事？")
    assert [len(batch) for batch in engine.batches] == [1, 3]
    assert "第 2 点" in told(engine.asked[2]) and told(engine.asked[2]).endswith("经过")
    assert outcome.answer == "1. 起因：甲。\n2. 经过：乙。\n3. 结果：丙。"
    assert [step.branch for step in outcome.trace[1:]] == ["point 1", "point 2", "point 3"]


def test_reflexion_learns_from_a_check() -> None:
    engine = Scripted(["18", "I forgot the eight.", "20"])
    outcome = technique({"use": "reflexion", "over": "direct"}).run(
        engine, APPLES, check=lambda question, found: "" if found.answer == "20" else f"不是 {found.answer}"
    )
    assert outcome.answer == "20" and "它被判为错误：不是 18" in told(engine.asked[1])
    assert told(engine.asked[2]).endswith("得到的教训是：\n1. I forgot the eight.")
    assert [step.role for step in outcome.trace] == ["answer", "check", "reflect", "answer", "check"]
    assert outcome.trace[-1].branch == "attempt 2"


def test_reflexion_judges_itself_and_stops_after_its_attempts() -> None:
    engine = Scripted(["17", "Let me see: wrong", "Too low.", "18", "It was wrong before.\n\nNow it is right."])
    outcome = technique({"use": "reflexion", "over": "direct"}).run(engine, "How many?")
    assert outcome.answer == "18" and not engine.left
    stubborn = Scripted(["a", "错误", "r", "b", "不正确", "r", "c", "错误"])
    outcome = technique({"use": "reflexion", "over": "direct", "memory": 1}).run(stubborn, "多少？")
    assert outcome.answer == "c" and not stubborn.left and told(stubborn.asked[6]).count("\n1. r") == 1


def test_reflexion_by_a_pattern() -> None:
    engine = Scripted(["about seven", "I must write digits.", "7"])
    outcome = technique({"use": "reflexion", "over": "direct", "pattern": r"\d+"}).run(engine, "How many?")
    assert outcome.answer == "7" and r"\d+" in told(engine.asked[1])
    with pytest.raises(FledgeError, match="no regular expression"):
        technique({"use": "reflexion", "pattern": "("})


def test_self_consistency_beats_one_sample_by_exactly_the_binomial() -> None:
    """Right with 3/5 each: 5 votes are right with Σ C(5,k) (3/5)^k (2/5)^(5−k), k ≥ 3 = 0.68256 (Wang et al., 2023)."""
    right, vote = Fraction(3, 5), technique({"use": "self_consistency", "samples": 5, "over": "direct"})
    total = Fraction(0)
    for draws in itertools.product([True, False], repeat=5):
        engine = Scripted(["所以答案是十八。" if good else "The answer is 17." for good in draws])
        found = vote.run(engine, "有多少个？").answer
        assert len(engine.batches) == 1 and engine.asked[0].temperature == 0.7
        chance = math.prod(right if good else 1 - right for good in draws)
        total += chance * ("十八" in found)
    assert total == sum(math.comb(5, k) * right**k * (1 - right) ** (5 - k) for k in (3, 4, 5)) == Fraction(2133, 3125)
    assert total > right


def test_self_consistency_over_chain_of_thought_over_few_shots() -> None:
    answers = itertools.cycle(["So the answer is 18.", "Hm. So the answer is １８ dollars.", "So the answer is 17."])
    engine = Scripted(lambda text, _: next(answers))
    nested = {"use": "cot", "over": {"use": "few_shot", "examples": SHOTS}}
    outcome = technique({"use": "self_consistency", "samples": 3, "over": nested}).run(engine, "How many?", seed=3)
    assert outcome.answer == "18" and len(engine.batches) == 1
    assert [len(request.messages or ()) for request in engine.asked] == [5, 5, 5]
    assert outcome.trace[-1].to_json() == {"role": "vote", "answer": "18", "observation": "18: 2, 17: 1"}


def test_anything_stands_over_anything() -> None:
    frames: list[dict[str, Any]] = [
        {"use": "role", "role": "a teacher"},
        {"use": "template", "text": "Q. {question}"},
        {"use": "few_shot", "examples": SHOTS},
    ]
    solvers: list[dict[str, Any]] = [
        {"use": name} for name in ("direct", "cot", "self_consistency", "least_to_most", "plan_and_solve", "reflexion")
    ]
    for outer, within in itertools.product([*frames, *solvers[1:]], [*frames, *solvers]):
        made = technique({**outer, "over": within})
        engine = Scripted(lambda text, _: "1. right\nSo the answer is 7.")
        for question in (Question.of("多少？"), Question.of("How many?", chat=False)):
            outcome = made.run(engine, question, seed=1)
            assert outcome.answer and outcome.trace, (outer, within)
        assert made.calls() >= 1 and made == technique(made.model_dump(mode="json"))


def test_wrong_settings_are_refused_with_the_right_ones() -> None:
    for given, what in (
        ("cott", 'no technique "cott"; did you mean "cot"'),
        ({}, "by its key `use`"),
        ({"use": "self_consistency", "sampels": 3}, r'technique\.sampels: "sampels" is unknown(.|\n)*mean "samples"'),
        ({"use": "self_consistency", "over": {"use": "cot", "answr": 1}}, r"technique\.over\.answr"),
        ({"use": "self_consistency", "samples": 0}, r"technique\.samples(.|\n)*found: 0"),
        (5, "found: 5"),
    ):
        with pytest.raises(FledgeError, match=what):
            technique(given)  # type: ignore[arg-type]


def test_both_languages_say_the_same_things() -> None:
    from fledge.inference.prompting.wordings import _page

    def keys(page: Any, name: str = "") -> set[str]:
        return {key for k, v in page.items() for key in keys(v, f"{name}.{k}")} if isinstance(page, dict) else {name}

    assert keys(_page("en")) == keys(_page("zh"))
    assert say("zh", "reflexion", "memory", question="{reflections}", reflections="甲").startswith("{reflections}\n")


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, fledge.inference.prompting; print({'numpy', 'torch', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    assert {"direct", "role", "format", "few_shot", "cot", "self_consistency", "tree_of_thoughts", "react", "reflexion",
            "plan_and_solve", "least_to_most", "skeleton_of_thought"} <= set(TECHNIQUES)  # fmt: skip


def test_a_solution_of_your_own() -> None:
    """A technique is a class with `use`, settings and a program; what a reader writes is one like the others."""
    from typing import Literal

    from fledge.inference.prompting import Technique

    class Echo(Technique):
        """Says the question."""

        use: Literal["echo"] = "echo"

        def program(self, question: Any, talk: Any) -> Any:
            text = yield from talk.ask("echo", question)
            return Solution(text, question.text)

    assert Echo().run(Scripted(["hi"]), "hello").text == "hello"
