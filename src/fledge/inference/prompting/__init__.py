"""Prompting techniques: small programs over an engine, each with its trace.

    from fledge.inference.prompting import technique

    vote = technique({"use": "self_consistency", "samples": 5, "over": {"use": "cot"}})
    outcome = vote.run(engine, "小明有 15 个苹果，给了小红 3 个，现在有多少个？", max_new_tokens=256, seed=0)
    print(outcome.answer, [step.role for step in outcome.trace])

`framing` puts questions (roles, templates, formats, examples), `reasoning`, `consistency`, `tree`, `react`, `reflexion`
and `skeleton` answer them; `program` says how several run side by side, `talk` what a step is, `answers` what an answer
says. Importing this imports nothing heavy.
"""

from fledge.inference.prompting.base import Outcome, Technique
from fledge.inference.prompting.program import drive, together
from fledge.inference.prompting.talk import Question, Solution, Step
from fledge.inference.prompting.techniques import TECHNIQUES, AnyTechnique, technique

__all__ = [
    "TECHNIQUES", "AnyTechnique", "Outcome", "Question", "Solution", "Step", "Technique", "drive", "technique",
    "together",
]  # fmt: skip
