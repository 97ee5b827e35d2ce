"""Tree of Thoughts on the Game of 24 (Yao et al., 2023), with an engine that proposes and judges by the rules."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from functools import cache

import pytest

from fledge.inference.engine import Request
from fledge.inference.prompting import technique
from fledge.inference.prompting.tools import calculate
from tests.inference.prompting.scripted import Scripted

QUESTION = {
    "en": "Use the numbers 4 9 10 13 and + - * / to get 24.",
    "zh": "用 4 9 10 13 四个数和加减乘除得到 24。",
}
WORDS = {"en": ("sure", "likely", "impossible"), "zh": ("肯定", "可能", "不可能")}


@cache
def can(numbers: tuple[Fraction, ...]) -> bool:
    """Whether these numbers give 24."""
    if len(numbers) == 1:
        return numbers[0] == 24
    return any(can(rest) for _, rest in moves(numbers))


def moves(numbers: tuple[Fraction, ...]) -> list[tuple[str, tuple[Fraction, ...]]]:
    """("13 - 9 = 4 (left: 4 4 10)", the numbers left) for every step."""
    found = []
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for sign, value in (("+", a + b), ("-", a - b), ("*", a * b), ("/", a / b if b else None)):
            if value is not None and not (sign in "+*" and i > j):
                left = tuple(sorted([*rest, value]))
                found.append((f"{a} {sign} {b} = {value} (left: {' '.join(map(str, left))})", left))
    return found


def left_in(text: str) -> tuple[Fraction, ...]:
    """The numbers that are left after the last step."""
    steps = re.findall(r"\(left: ([^)]*)\)", text)
    return tuple(map(Fraction, steps[-1].split())) if steps else tuple(map(Fraction, (4, 9, 10, 13)))


def expression(text: str) -> str:
    """The steps put together into one expression."""
    known: dict[str, str] = {}
    whole = ""
    for a, sign, b, value in re.findall(r"^(\S+) ([-+*/]) (\S+) = (\S+) \(left", text, re.M):
        whole = f"({known.pop(a, a)} {sign} {known.pop(b, b)})"
        known[value] = whole
    return whole


class Player:
    """Proposes some steps, a good one among them but not first; judges by the rules, mistaken about `blind` states."""

    def __init__(self, language: str, blind: tuple[Fraction, ...] = ()) -> None:
        self.language, self.blind = language, blind

    def __call__(self, text: str, request: Request) -> str:
        left = left_in(text)
        if "different possible next steps" in text or "不同的下一步" in text:
            steps = moves(left)
            good = [line for line, rest in steps if can(rest)][:1]
            bad = [line for line, rest in steps if not can(rest)][:3]
            return "\n".join(f"{n}. {line}" for n, line in enumerate([*bad, *good], start=1))
        if "sure, likely or impossible" in text or "肯定、可能或不可能" in text:
            sure, likely, impossible = WORDS[self.language]
            if left == self.blind:
                return f"Hard to say.\n{sure}"
            return f"{left}\n{likely if can(left) else impossible}"
        assert "final answer" in text or "最终答案" in text
        return expression(text) + " = 24"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("search", ["bfs", "dfs"])
def test_the_game_of_24(language: str, search: str) -> None:
    engine = Scripted(Player(language))
    settings = {"use": "tree_of_thoughts", "search": search, "depth": 3, "breadth": 2, "thoughts": 4, "answer": "text"}
    outcome = technique(settings).run(engine, QUESTION[language])
    found = outcome.answer.partition("=")[0]
    assert calculate(found) == "24" and sorted(re.findall(r"\d+", found), key=int) == ["4", "9", "10", "13"]
    roles = [step.role for step in outcome.trace]
    if search == "bfs":  # each depth: one batch of proposals, one of judgements; then the answer
        assert [len({r.messages for r in batch}) == len(batch) for batch in engine.batches] == [True] * 7
        assert roles.count("keep") == 3 and roles.count("propose") == 1 + 2 + 2
        judged = [step.prompt for step in outcome.trace if step.role == "value"]
        assert len(set(judged)) == len(judged) > 4
    else:
        assert roles.count("propose") == 3 and "keep" not in roles


def test_depth_first_search_turns_back_from_a_dead_end() -> None:
    dead = next(rest for _, rest in moves(left_in("")) if not can(rest))
    engine = Scripted(Player("en", blind=dead))
    settings = {"use": "tree_of_thoughts", "search": "dfs", "depth": 3, "thoughts": 4, "answer": "text"}
    outcome = technique(settings).run(engine, QUESTION["en"])
    back = [step for step in outcome.trace if step.role == "back"]
    assert len(back) == 1 and " ".join(map(str, dead)) in back[0].observation
    assert calculate(outcome.answer.partition("=")[0]) == "24"


def test_a_greedy_search_of_breadth_one_follows_the_mistake() -> None:
    """The same mistaken judge: without a way back the search fails, which is what the tree is for."""
    dead = next(rest for _, rest in moves(left_in("")) if not can(rest))
    settings = {"use": "tree_of_thoughts", "search": "bfs", "depth": 3, "breadth": 1, "thoughts": 4, "answer": "text"}
    lost = technique(settings).run(Scripted(Player("en", blind=dead)), QUESTION["en"])
    assert calculate(lost.answer.partition("=")[0]) != "24"
    won = technique({**settings, "breadth": 2}).run(Scripted(Player("en", blind=dead)), QUESTION["en"])
    assert calculate(won.answer.partition("=")[0]) == "24"


def test_samples_and_votes() -> None:
    plans = iter(["a plan", "a poem", "a plan"])

    def says(text: str, request: Request) -> str:
        if "Write the next step" in text:
            assert request.temperature == 0.9
            return next(plans)
        if "most promising" in text:
            assert "1.\na plan\n2.\na poem" in text  # the same thought twice is one
            return "The poem has rhythm. The best choice is 2."
        return "Roses"

    settings = {"use": "tree_of_thoughts", "depth": 1, "thoughts": 3, "generate": "sample", "judge": "vote",
                "judgements": 3, "temperature": 0.9, "thought": "a plan of the text"}  # fmt: skip
    outcome = technique(settings).run(Scripted(says), "Write something.", seed=5)
    assert outcome.answer == "Roses" and outcome.text == "a poem\nRoses"
    assert next(step for step in outcome.trace if step.role == "keep").observation.startswith("3: a poem")


def test_a_search_ends_where_nothing_is_proposed_or_its_states_are_used_up() -> None:
    silent = technique({"use": "tree_of_thoughts", "search": "bfs"}).run(Scripted(lambda text, _: ""), "How?")
    assert silent.answer == ""
    for search in ("bfs", "dfs"):
        engine = Scripted(lambda text, _: "1. on\n2. and on" if "propose" in text.lower() else "likely")
        technique({"use": "tree_of_thoughts", "search": search, "depth": 20, "states": 7}).run(engine, "How?")
        assert sum("Propose" in str(request.messages) for request in engine.asked) == 7
