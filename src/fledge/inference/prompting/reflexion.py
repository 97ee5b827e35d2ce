"""Reflexion: tried, judged, reflected on, tried again with the reflection in mind."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fledge.core.language import t
from fledge.inference.prompting.base import Technique
from fledge.inference.prompting.program import Program
from fledge.inference.prompting.reasoning import ChainOfThought
from fledge.inference.prompting.talk import Question, Solution, Talk
from fledge.inference.prompting.wordings import say

if TYPE_CHECKING:
    from fledge.inference.prompting.techniques import AnyTechnique

_VERDICT = re.compile(r"\b(right|wrong|correct|incorrect)\b|(不正确|不对|错误|正确)", re.IGNORECASE)
_GOOD = {"right", "correct", "正确"}


class Reflexion(Technique):
    """Verbal learning from failed attempts (Shinn et al., 2023): a memory of reflections, no weights.

    An attempt is judged by the `check` that the run is given, else by `pattern`, else by the model itself (which finds
    fewer of its errors than a real check does). The last attempt stands, right or wrong.
    """

    guarded: ClassVar[tuple[str, ...]] = ("pattern",)  # some expressions take for ever

    use: Literal["reflexion"] = Field("reflexion", description="attempts, and what is learned from them")
    attempts: int = Field(3, ge=1, le=20, description="attempts at most")
    memory: int = Field(3, ge=1, le=20, description="so many of the latest reflections are kept in mind")
    pattern: str = Field("", description="a regular expression that a right answer matches as a whole")
    over: AnyTechnique | None = Field(None, description="how an attempt is made; without one, chain of thought")

    @model_validator(mode="after")
    def _pattern_is_one(self) -> Self:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(t("this is no regular expression: {message}", message=str(error))) from None
        return self

    def calls(self) -> float:
        return (1 + self.attempts) / 2 * ((self.over.calls() if self.over else 2) + 2)

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        lang, reflections = question.language, list[str]()
        for attempt in range(1, self.attempts + 1):
            line = talk.within(f"attempt {attempt}")
            asked = question
            if reflections:
                learned = "\n".join(f"{n}. {text}" for n, text in enumerate(reflections[-self.memory :], start=1))
                remembered = say(lang, "reflexion", "memory", question=question.text, reflections=learned)
                asked = question.asking(remembered)
            found = yield from (self.over or ChainOfThought()).program(asked, line)
            wrong = yield from self._judged(question, found, line)
            if not wrong or attempt == self.attempts:
                break
            values = {"question": question.text, "answer": _told(found), "feedback": wrong}
            reflect = question.alone(say(lang, "reflexion", "reflect", **values))
            reflections.append((yield from line.ask("reflect", reflect)))
        return found

    def _judged(self, question: Question, found: Solution, talk: Talk) -> Program[str]:
        """What is wrong with an attempt; "" when nothing is."""
        lang = question.language
        if talk.check is not None:
            wrong = talk.check(question, found)
        elif self.pattern:
            fits = re.fullmatch(self.pattern, found.answer.strip()) is not None
            wrong = "" if fits else say(lang, "reflexion", "pattern", pattern=self.pattern)
        else:
            ask = say(lang, "reflexion", "check", question=question.text, answer=_told(found))
            said = yield from talk.ask("check", question.alone(ask))
            verdicts = [first or second for first, second in _VERDICT.findall(said)]
            return "" if verdicts and verdicts[-1].lower() in _GOOD else said or "—"
        talk.decide("check", answer=found.answer, observation=wrong)
        return wrong


def _told(found: Solution) -> str:
    return found.text if found.answer in found.text else f"{found.text}\n\n{found.answer}"
