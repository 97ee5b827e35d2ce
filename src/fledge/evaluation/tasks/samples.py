"""Task `samples`: what every model writes after the same prompts, to be read by a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fledge.core.job import Job
from fledge.core.units import Count
from fledge.evaluation.tasks.base import Conclusion, Item, Task, Tell

if TYPE_CHECKING:
    from fledge.evaluation.subject import Subject


class Samples(Task):
    """The same prompts for every model: answered as a chat, or continued by models that only complete text."""

    task: Literal["samples"] = Field("samples", description="texts to read")
    prompts: list[str] = Field(min_length=1, description="what is said to the model, in any language")
    max_new_tokens: Count = Field(60, ge=1, description="tokens a model may write")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token; above, the draw is seeded")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that together reach this mass")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1, tokens already there become less likely")

    def load(self, job: Job) -> list[str]:
        return list(self.prompts)

    def tokens(self) -> float:
        return len(self.prompts) * (20 + 20 * self.max_new_tokens)

    def ask(self, rows: list[str], subject: Subject, seed: int, tell: Tell) -> list[Item]:
        from fledge.evaluation.subject import answer

        settings = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": seed % 2**31,
        }
        texts = answer(subject, rows, settings, tell)
        return [
            {"prompt": prompt, "text": choice.text, "chat": subject.chats, "ended": choice.finish_reason}
            for prompt, choice in zip(rows, texts, strict=True)
        ]

    def conclude(
        self, rows: list[str], answers: Mapping[str, list[Item]], roles: Mapping[str, str], seed: int
    ) -> Conclusion:
        return Conclusion({model: {} for model in answers})
