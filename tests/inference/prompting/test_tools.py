"""The calculator, the search, Python; and ReAct, which uses them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core import sandbox
from fledge.core.errors import FledgeError
from fledge.core.sandbox import Limits
from fledge.inference.prompting import Question, technique
from fledge.inference.prompting.react import action
from fledge.inference.prompting.tools import Calculator, Python, Search, ToolError, calculate
from tests.inference.prompting.scripted import Scripted, told

confined = pytest.mark.skipif(bool(sandbox.why_not()), reason=f"programs cannot be confined: {sandbox.why_not()}")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(12 + 7) * 3 / 2", "28.5"),
        ("0.1 + 0.2", "0.3"),
        ("１２×（３＋４）÷２ =", "42"),
        ("2^10", "1024"),
        ("3²+4²", "25"),
        ("1/3", "0.333333333333"),
        ("1/3*3", "1"),
        ("1,234 + 1", "1235"),
        ("max(1,234)", "234"),
        ("15% * 200", "30"),
        ("17 % 5", "2"),
        ("sqrt(2)", "1.41421356237"),
        ("-7 // 2", "-4"),
        ("factorial(20)", "2432902008176640000"),
        ("comb(5, 2) + round(2.567, 1)", "12.6"),
        ("2 * pi", "6.28318530718"),
        ("10 ** -2", "0.01"),
        ("2 ** 0.5", "1.41421356237"),
    ],
)
def test_the_calculator(expression: str, value: str) -> None:
    assert calculate(expression) == value


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.integers(1, 999))
def test_the_calculator_is_exact(a: int, b: int, c: int) -> None:
    assert calculate(f"({a} - {b}) * {c}") == str((a - b) * c)
    assert math.isclose(float(calculate(f"{a} / {c}")), a / c, rel_tol=1e-11)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('id')", "(1).__class__", "[1, 2]", "x + 1", "lambda: 1", "open('f')", "'a' * 9",
        "True + 1", "1 if 2 else 3", "9 ** 9 ** 9", "factorial(10 ** 9)", "1 / 0", "sqrt(-1)", "", "1 +", "(" * 500,
        "2 ** 99999", "10 ** 4000 * 10 ** 4000", "-" * 399 + "1", "1e999", "f'{1}'", "abs(*[1])", "round(1, ndigits=1)",
        "comb(10**6, 5)",
    ],
)  # fmt: skip
def test_what_the_calculator_refuses_at_once(expression: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ToolError):
        calculate(expression)
    assert time.monotonic() - begun < 1


def test_react_thinks_acts_and_sees() -> None:
    engine = Scripted(
        [
            "思考：先算减法。\n行动：calculator[15-3]\n观察：不该由模型来写",
            "思考：再加八。\n行动：calculator【12 + 8】",
            "思考：完成了。\n行动：finish[20个苹果]",
        ]
    )
    outcome = technique({"use": "react", "answer": "number"}).run(
        engine, "小明有15个苹果，给了小红3个，又买了8个，现在有多少个？"
    )
    assert outcome.answer == "20"
    assert [(s.tool, s.answer, s.observation) for s in outcome.trace if s.role == "tool"] == [
        ("calculator", "15-3", "12"), ("calculator", "12 + 8", "20")
    ]  # fmt: skip
    first, second, third = (request.messages for request in engine.asked)
    assert "calculator：计算一个算式的值" in first[0].content and "问题：小明" in first[0].content  # type: ignore[index]
    assert [m.content for m in second[1:]] == ["思考：先算减法。\n行动：calculator[15-3]", "观察：12"]  # type: ignore[index]
    assert [m.role for m in third] == ["user", "assistant", "user", "assistant", "user"]  # type: ignore[union-attr]


def test_react_as_a_text_that_goes_on() -> None:
    engine = Scripted([" I need the product.\nAction: calculator[6*7]", " Done.\nAction: finish[42]"])
    outcome = technique("react").run(engine, Question.of("What is 6 times 7?", chat=False))
    assert outcome.answer == "42"
    assert engine.asked[0].text.endswith("\n\nWhat is 6 times 7?\nAnswer: Thought:")  # type: ignore[union-attr]
    went_on = "Answer: I need the product.\nAction: calculator[6*7]\nObservation: 42\nThought:"
    assert engine.asked[1].text.endswith(went_on)  # type: ignore[union-attr]
    assert "\nObservation:" in engine.asked[0].stop


def test_mistakes_are_observations() -> None:
    engine = Scripted(
        ["I know it.", "Action: search[x]", "Action: calculator[2 +]", "Action: calculator[1/0]", "Action: finish[7]"]
    )
    outcome = technique("react").run(engine, "How many?")
    seen = [step.observation for step in outcome.trace if step.role == "tool"]
    assert (
        seen[0].startswith("No action") and "calculator, finish" in seen[1] and "Error" in seen[2] and "zero" in seen[3]
    )
    assert outcome.answer == "7"


def test_react_is_asked_for_the_answer_when_its_steps_are_used_up() -> None:
    engine = Scripted(["Action: calculator[1+1]", "Action: calculator[1+1]", "2"])
    outcome = technique({"use": "react", "steps": 2}).run(engine, "1 + 1?")
    assert outcome.answer == "2" and told(engine.asked[2]).startswith("Observation: 2\n\nNo more actions")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Action: calculator[max(1, [2][0])]", ("calculator", "max(1, [2][0])")),
        ("**Action 1**: finish[yes] and more", ("finish", "yes")),
        ("行动：calculator（1＋1）", ("calculator", "1＋1")),
        ("Action: python[print('a]b')\nx = [1]", ("python", "print('a")),
        ("Action: search[never closed", ("search", "never closed")),
        ("Thought: Action is needed", ("", "")),
        ("action: a\nAction: calculator[2]\nAction: calculator[3]", ("calculator", "2")),
    ],
)
def test_actions_are_read(text: str, found: tuple[str, str]) -> None:
    assert action(text) == found


@dataclass
class Passage:
    text: str
    where: str


class Shelf:
    """Finds what holds a word of the query."""

    def search(self, query: str, k: int) -> list[Passage]:
        books = [Passage("泰山海拔1532.7米。", "山.md#L3"), Passage("黄河全长5464公里。\n" * 80, "河.md#L1")]
        return [book for book in books if query[:2] in book.text][:k]


def test_react_searches_and_names_its_place() -> None:
    engine = Scripted(["思考：要查。\n行动：search[泰山的高度]", "行动：search[月亮]", "行动：finish[1532.7米]"])
    outcome = technique({"use": "react", "tools": ["search"]}).run(
        engine, "泰山多高？", tools={"search": Search(Shelf())}
    )
    tools = [step.observation for step in outcome.trace if step.role == "tool"]
    assert tools == ["[1] (山.md#L3) 泰山海拔1532.7米。", "没有找到任何内容。"]
    long = Search(Shelf(), characters=50)("黄河", "zh")
    assert long.endswith("…") and len(long) < 80
    with pytest.raises(ToolError, match="empty"):
        Search(Shelf())(" ", "en")
    with pytest.raises(FledgeError, match=r'no tool "search"(.|\n)*index'):
        technique({"use": "react", "tools": ["search"]}).run(Scripted([]), "泰山多高？")


@confined
def test_react_writes_python_that_runs_in_the_sandbox() -> None:
    code = "```python\nnumbers = [n for n in range(100) if n % 7 == 0]\nprint(sum(numbers))\n```"
    engine = Scripted([f"Action: python[{code}]", "Action: finish[735]"])
    outcome = technique({"use": "react", "tools": ["python"]}).run(engine, "Sum of multiples of 7 below 100?")
    assert outcome.trace[1].observation == "735" == outcome.answer
    tool = Python(Limits(seconds=1.0))
    assert tool("1 / 0", "zh") == "出错：ZeroDivisionError: division by zero"
    assert (
        tool("while True: pass", "en").endswith("its time was up.") and tool("x = 1", "zh") == "程序没有打印任何内容。"
    )
    assert "Error" in tool("open('/etc/passwd')", "en")


def test_python_is_not_run_in_the_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    engine = Scripted(["Action: python[print(1)]"])
    with pytest.raises(FledgeError, match="cannot confine"):
        technique({"use": "react", "tools": ["python"]}).run(engine, "1?")


def test_a_tool_of_your_own() -> None:
    class Weather:
        name = "weather"

        def describe(self, language: str) -> str:
            return "the weather of a place"

        def __call__(self, given: str, language: str) -> str:
            return f"sunny in {given}"

    engine = Scripted(["Action: weather[Jinan]", "Action: finish[sunny]"])
    react = technique({"use": "react", "tools": ["weather", "calculator"]})
    assert react.needs() == {"weather", "calculator"}
    assert react.run(engine, "How is it in Jinan?", tools={"weather": Weather()}).answer == "sunny"
    assert "- weather: the weather of a place" in told(engine.asked[0])
    assert Calculator()("2+2", "en") == "4"
