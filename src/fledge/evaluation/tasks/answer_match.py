"""Task `answer_match`: does the model's own answer hold what it must, as its name in identity questions?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr

from fledge.core.artifact import Index, Prompts
from fledge.core.errors import FledgeError, Problem
from fledge.core.intervals import wilson
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.units import Count
from fledge.evaluation.tasks.base import Conclusion, Item, Paired, Task, Tell
from fledge.inference.prompting import AnyTechnique
from fledge.inference.prompting.answers import extract, key

if TYPE_CHECKING:
    from fledge.evaluation.subject import Subject
    from fledge.inference.prompting.tools import Tool


class AnswerMatch(Task):
    """Greedy answers to prompts with a verifiable answer: right out of n, with Wilson's interval.

    With a `technique` the model answers by a prompting technique, whose answer alone is judged; the items keep the
    trace. `answer` compares what two texts say: 18, "１８元" and "The answer is eighteen dollars: 18." are the same.
    """

    task: Literal["answer_match"] = Field("answer_match", description="answers that can be checked")
    data: Ref[Prompts] = Field(description="prompts with an `answer` each")
    match: Literal["contains", "exact", "regex", "answer"] = Field(
        "contains", description="when an answer counts as right; answer: its number, choice or words are those expected"
    )
    technique: AnyTechnique | None = Field(None, description="a prompting technique by which the model answers")
    index: Ref[Index] | None = Field(None, description="an index in which `retrieval` and the tool `search` look")
    max_new_tokens: Count = Field(48, ge=1, description="tokens a model may write")
    limit: Count | None = Field(None, ge=1, description="prompts at most, evenly spaced")
    _tools: dict[str, Tool] = PrivateAttr(default_factory=dict)

    @property
    def key(self) -> str:
        return self.label or (f"{self.task}_{self.technique.name}" if self.technique else self.task)

    def load(self, job: Job) -> list[Any]:
        from fledge.evaluation.subject import spread
        from fledge.records.shards import read

        rows: list[Any] = spread(list(read(job.open(self.data), "prompts")), self.limit)
        if not rows or any(not row.answer for row in rows):
            where = next((row.messages[-1].content[:60] for row in rows if not row.answer), self.data.text)
            raise FledgeError(Problem(t("a prompt has no answer that could be checked"), where=where))
        if self.index is not None:
            from fledge.inference.prompting.tools import Search
            from fledge.inference.retrieval.retriever import Retriever

            self._tools["search"] = Search(Retriever.open(job.open(self.index).path))
        return rows

    def tokens(self) -> float:
        calls = self.technique.calls() if self.technique else 1
        return (self.limit or 20) * (20 + 20 * self.max_new_tokens) * calls

    def ask(self, rows: list[Any], subject: Subject, seed: int, tell: Tell) -> list[Item]:
        from fledge.evaluation.subject import answer, solve

        settings = {"max_new_tokens": self.max_new_tokens, "temperature": 0.0}
        prompts = [row.messages for row in rows]
        more: list[Item] = [{} for _ in rows]
        if self.technique is None:
            texts = [choice.text for choice in answer(subject, prompts, settings, tell)]
        else:
            outcomes = solve(subject, prompts, self.technique, settings, seed, tell, self._tools)
            texts = [outcome.answer for outcome in outcomes]
            more = [{"technique": outcome.to_json()} for outcome in outcomes]
        return [
            {
                "id": row.id,
                "prompt": row.messages[-1].content,
                "expected": row.answer,
                "text": text,
                "right": matches(text, row.answer, self.match),
                **extra,
            }
            for row, text, extra in zip(rows, texts, more, strict=True)
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
    if how == "answer":
        return key(extract(text)) == key(expected)
    found, wanted = _plain(text), _plain(expected)
    return wanted in found if how == "contains" else wanted == found


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
