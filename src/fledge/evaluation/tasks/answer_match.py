"""Task `answer_match`: does the model's own answer hold what it must, as its name in identity questions?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fledge.core.artifact import Prompts
from fledge.core.errors import FledgeError, Problem
from fledge.core.intervals import wilson
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.units import Count
from fledge.evaluation.tasks.base import Conclusion, Item, Paired, Task, Tell

if TYPE_CHECKING:
    from fledge.evaluation.subject import Subject


class AnswerMatch(Task):
    """Greedy answers to prompts with a verifiable answer: right out of n, with Wilson's interval."""

    task: Literal["answer_match"] = Field("answer_match", description="answers that can be checked")
    data: Ref[Prompts] = Field(description="prompts with an `answer` each")
    match: Literal["contains", "exact", "regex"] = Field("contains", description="when an answer counts as right")
    max_new_tokens: Count = Field(48, ge=1, description="tokens a model may write")
    limit: Count | None = Field(None, ge=1, description="prompts at most, evenly spaced")

    def load(self, job: Job) -> list[Any]:
        from fledge.evaluation.subject import spread
        from fledge.records.shards import read

        rows: list[Any] = spread(list(read(job.open(self.data), "prompts")), self.limit)
        if not rows or any(not row.answer for row in rows):
            where = next((row.messages[-1].content[:60] for row in rows if not row.answer), self.data.text)
            raise FledgeError(Problem(t("a prompt has no answer that could be checked"), where=where))
        return rows

    def tokens(self) -> float:
        return (self.limit or 20) * (20 + 20 * self.max_new_tokens)

    def ask(self, rows: list[Any], subject: Subject, seed: int, tell: Tell) -> list[Item]:
        from fledge.evaluation.subject import answer

        settings = {"max_new_tokens": self.max_new_tokens, "temperature": 0.0}
        choices = answer(subject, [row.messages for row in rows], settings, tell)
        return [
            {
                "id": row.id,
                "prompt": row.messages[-1].content,
                "expected": row.answer,
                "text": choice.text,
                "right": matches(choice.text, row.answer, self.match),
            }
            for row, choice in zip(rows, choices, strict=True)
        ]

    def conclude(
        self, rows: list[Any], answers: Mapping[str, list[Item]], roles: Mapping[str, str], seed: int
    ) -> Conclusion:
        right = {model: [float(item["right"]) for item in items] for model, items in answers.items()}
        models = {model: {self.key: wilson(sum(r), len(r))} for model, r in right.items()}
        return Conclusion(models, paired=(Paired(self.key, right),))


def matches(text: str, expected: str, how: str) -> bool:
    """Whether `text` holds (or is) the expected answer, whatever the case, width and spacing of its letters."""
    if how == "regex":
        return re.search(expected, text, re.IGNORECASE) is not None
    found, wanted = _plain(text), _plain(expected)
    return wanted in found if how == "contains" else wanted == found


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
