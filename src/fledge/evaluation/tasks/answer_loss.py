"""Task `answer_loss`: how surprised a model is by the held-out answers of real people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fledge.core.artifact import Conversations
from fledge.core.intervals import ratio_interval
from fledge.core.job import Job
from fledge.core.reference import Ref
from fledge.core.units import Count
from fledge.evaluation.tasks.base import Conclusion, Item, Number, Paired, Task, Tell

if TYPE_CHECKING:
    from fledge.evaluation.subject import Subject


class AnswerLoss(Task):
    """Mean negative log-likelihood (nats) of the content tokens of held-out answers, rendered as a chat.

    The token that ends a turn is left out: a model that never saw a chat pays for it without saying anything worse.
    Comparable among models with the same tokenizer.
    """

    task: Literal["answer_loss"] = Field("answer_loss", description="loss on held-out answers")
    data: Ref[Conversations] = Field(description="held-out conversations")
    limit: Count | None = Field(400, ge=1, description="conversations at most, evenly spaced")

    def load(self, job: Job) -> list[Any]:
        from fledge.evaluation.subject import spread
        from fledge.records.shards import read

        return spread(list(read(job.open(self.data), "conversations")), self.limit)

    def tokens(self) -> float:
        return (self.limit or 1000) * 120

    def ask(self, rows: list[Any], subject: Subject, seed: int, tell: Tell) -> list[Item]:
        from fledge.evaluation.subject import need_renderer

        renderer = need_renderer(subject)
        rendered = [renderer.render(row.messages) for row in rows]
        ids = [r.ids[: subject.engine.context + 1] for r in rendered]
        scored = subject.score([i[:1] for i in ids], [i[1:] for i in ids], tell)
        ends = frozenset(renderer.stop_ids)
        items = []
        for row, r, row_ids, score in zip(rows, rendered, ids, scored, strict=True):
            counted = [
                logprob
                for token, weight, logprob in zip(row_ids[1:], r.weights[1:], score.logprobs, strict=False)
                if weight > 0 and token not in ends
            ]
            items.append({"id": row.id, "language": row.language, "loss": -sum(counted), "tokens": len(counted)})
        return items

    def conclude(
        self, rows: list[Any], answers: Mapping[str, list[Item]], roles: Mapping[str, str], seed: int
    ) -> Conclusion:
        name = self.key
        models: dict[str, dict[str, Number]] = {}
        for model, items in answers.items():
            languages = sorted({item["language"] for item in items if item["language"]})
            groups = {name: items} | {
                f"{name}_{language}": [i for i in items if i["language"] == language] for language in languages
            }
            models[model] = {key: found for key, group in groups.items() if (found := _loss(group, seed)) is not None}
        paired = Paired(
            name,
            {model: [i["loss"] for i in items] for model, items in answers.items()},
            {model: [i["tokens"] for i in items] for model, items in answers.items()},
            proportion=False,
        )
        return Conclusion(models, paired=(paired,))


def _loss(items: list[Item], seed: int) -> Number | None:
    if not any(item["tokens"] for item in items):
        return None
    found = ratio_interval([i["loss"] for i in items], [i["tokens"] for i in items], seed)
    return found if found.n > 1 else found.value  # one conversation says nothing of others
