"""Thinking before answering: chain of thought, plan-and-solve, least-to-most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fledge.inference.prompting.answers import Kind, extract, listed
from fledge.inference.prompting.base import Technique
from fledge.inference.prompting.framing import Example, FewShot, inner
from fledge.inference.prompting.program import Program
from fledge.inference.prompting.talk import Question, Solution, Talk
from fledge.inference.prompting.wordings import say

if TYPE_CHECKING:
    from fledge.inference.prompting.techniques import AnyTechnique

_ANSWER: Kind = "auto"
ANSWER = Field(_ANSWER, description="what the answer is: a number, a choice's letter, a text; auto: what it looks like")


class ChainOfThought(Technique):
    """Step by step (Wei et al., 2022, with examples that reason; Kojima et al., 2022, without: "Let's think …").

    Without examples the model reasons first and is then asked for the answer alone (Kojima's second step); with them it
    is read from the sentence that the examples teach ("So the answer is …"), and asked for only where that is missing.
    """

    use: Literal["cot"] = Field("cot", description="step by step")
    examples: list[Example] = Field([], description="examples with their reasoning, shown before the question")
    answer: Kind = ANSWER
    extract: Literal["auto", "ask", "read"] = Field(
        "auto", description="ask for the answer after the reasoning, or read it from there; auto: read after examples"
    )
    trigger: str = Field("", description="what makes the model reason, instead of `Let's think step by step.`")
    over: AnyTechnique | None = Field(None, description="the technique that does the reasoning; without one, the model")

    def calls(self) -> float:
        return super().calls() + (0 if self.examples and self.extract != "ask" else 1)

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        technique: Technique = inner(self.over)
        if self.examples:
            technique = FewShot(examples=self.examples, over=self.over)
        taught = isinstance(technique, FewShot) and any(example.reasoning for example in technique.examples)
        trigger = self.trigger or ("" if taught else say(question.language, "chain_of_thought", "trigger"))
        read = self.extract == "read" or (self.extract == "auto" and taught)
        return (yield from reason(question, talk, technique, trigger, self.answer, read))


class PlanAndSolve(Technique):
    """A plan, then its execution: the PS+ prompt of Wang, Xu, et al. (2023), and the answer asked for afterwards."""

    use: Literal["plan_and_solve"] = Field("plan_and_solve", description="a plan first, then its steps")
    answer: Kind = ANSWER
    over: AnyTechnique | None = Field(None, description="the technique that plans and solves; without one, the model")

    def calls(self) -> float:
        return super().calls() + 1

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        trigger = say(question.language, "plan_and_solve", "trigger")
        return (yield from reason(question, talk, inner(self.over), trigger, self.answer, read=False))


class LeastToMost(Technique):
    """Simpler questions first, each answered with those before it in view (Zhou et al., 2023)."""

    use: Literal["least_to_most"] = Field("least_to_most", description="from simpler questions to the whole one")
    most: int = Field(5, ge=1, le=20, description="subquestions at most")
    answer: Kind = ANSWER
    over: AnyTechnique | None = Field(None, description="the technique that answers them; without one, the model")

    def calls(self) -> float:
        return 1 + (self.most / 2 + 1) * super().calls()

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        lang = question.language
        ask = say(lang, "least_to_most", "decompose", question=question.text, most=self.most)
        parts = listed((yield from talk.ask("decompose", question.asking(ask))), self.most)
        parts = [part for part in parts if part.strip() != question.text.strip()]
        solved = ""
        for number, part in enumerate([*parts, ""], start=1):
            last = number > len(parts)
            text = say(
                lang, "least_to_most", "subquestion", solved=solved, problem=question.text,
                question=question.text if last else part,
            ) if solved or not last else question.text  # fmt: skip
            branch = talk.within("whole" if last else f"part {number}")
            found = yield from inner(self.over).program(question.asking(text), branch)
            solved += say(lang, "least_to_most", "solved", question=part, answer=found.text)
        return Solution(extract(found.answer, self.answer) or found.answer, found.text)


def reason(
    question: Question, talk: Talk, technique: Technique, trigger: str, kind: Kind, read: bool
) -> Program[Solution]:
    """Reasoning brought about by `trigger`, then the answer: read from it, or asked for in a second step."""
    asked = question
    if trigger:
        asked = question.asking(f"{question.text}\n\n{trigger}") if question.chat else question.beginning(trigger)
    thought = yield from technique.program(asked, talk)
    if read and (answer := extract(thought.text, kind, marked=True)):
        return Solution(answer, thought.text)
    lang = question.language
    if question.chat:
        last = asked.followed_by(thought.text, say(lang, "extract", f"{kind}.ask"))
    else:
        reasoned = " ".join(part for part in (trigger, thought.text) if part)
        last = question.beginning(f"{reasoned}\n{say(lang, 'extract', f'{kind}.begin')}")
    text = yield from talk.ask("extract", last)
    return Solution(extract(text, kind) or text, thought.text)
