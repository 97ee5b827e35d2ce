"""Self-consistency: several ways of thinking, and the answer on which most of them agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fledge.inference.prompting.answers import Kind, key, majority
from fledge.inference.prompting.base import Technique
from fledge.inference.prompting.program import Program, together
from fledge.inference.prompting.reasoning import ANSWER, ChainOfThought
from fledge.inference.prompting.talk import Question, Solution, Talk

if TYPE_CHECKING:
    from fledge.inference.prompting.techniques import AnyTechnique


class SelfConsistency(Technique):
    """The answer that most sampled ways of reasoning lead to (Wang et al., 2023).

    The samples go through the engine side by side, each with a seed of its own. Answers vote in their normalised form
    (18 = １８ = 十八, B = (b)); of equally many the earlier one wins.
    """

    use: Literal["self_consistency"] = Field("self_consistency", description="a vote of several samples")
    samples: int = Field(5, ge=1, le=64, description="how many samples vote")
    temperature: float = Field(0.7, gt=0, le=100, description="of the samples; takes the place of the request's own")
    answer: Kind = ANSWER
    over: AnyTechnique | None = Field(None, description="the technique that is sampled; without one, chain of thought")

    def calls(self) -> float:
        return self.samples * (self.over.calls() if self.over else 2)

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        technique = self.over or ChainOfThought(answer=self.answer)
        solutions = yield from together(
            [
                technique.program(question, talk.within(f"sample {n}", temperature=self.temperature))
                for n in range(1, self.samples + 1)
            ]
        )
        answer, votes = majority([solution.answer for solution in solutions], self.answer)
        counted = ", ".join(f"{vote}: {count}" for vote, count in votes.most_common())
        talk.decide("vote", answer=answer, observation=counted)
        text = next((s.text for s in solutions if key(s.answer, self.answer) == key(answer, self.answer)), "")
        return Solution(answer, text)
