"""Skeleton-of-Thought: first the points of an answer, then all of them written at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fledge.inference.prompting.answers import listed
from fledge.inference.prompting.base import Technique
from fledge.inference.prompting.program import Program
from fledge.inference.prompting.talk import Ask, Question, Solution, Talk
from fledge.inference.prompting.wordings import say


class SkeletonOfThought(Technique):
    """The points of the answer, then every point in parallel (Ning et al., 2024).

    The points enter the engine as one batch: a long answer in the time of a short one. For questions whose points do
    not depend on each other, not for mathematics. Where the model gives no points, it answers as it would have.
    """

    use: Literal["skeleton_of_thought"] = Field("skeleton_of_thought", description="the points first, then all at once")
    most: int = Field(10, ge=2, le=50, description="points at most")

    def calls(self) -> float:
        return 1 + self.most / 2

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        lang = question.language
        ask = say(lang, "skeleton_of_thought", "skeleton", question=question.text, most=self.most)
        points = listed((yield from talk.ask("skeleton", question.asking(ask))), self.most)
        if not points:
            text = yield from talk.ask("answer", question)
            return Solution(text, text)
        skeleton = "\n".join(f"{number}. {point}" for number, point in enumerate(points, start=1))
        asks = []
        for number, point in enumerate(points, start=1):
            values = {"question": question.text, "skeleton": skeleton, "number": number, "point": point}
            asked = question.asking(say(lang, "skeleton_of_thought", "point", **values))
            asks.append(Ask(asked, f"point {number}"))
        written = yield from talk.ask_all("point", asks)
        colon = "：" if lang == "zh" else ": "
        lines = [
            f"{number}. {point.rstrip('.。:：')}{colon}{text}"
            for number, (point, text) in enumerate(zip(points, written, strict=True), start=1)
        ]
        text = "\n".join(lines)
        return Solution(text, text)
