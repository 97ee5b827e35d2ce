"""Task `preference_accuracy`: which of two answers would the model take, and is it the one that people preferred?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fledge.core.artifact import Model, Preferences, RewardModel
from fledge.core.intervals import Interval, wilson
from fledge.core.job import Job
from fledge.core.reference import Ref
from fledge.core.units import Count
from fledge.evaluation.tasks.base import Conclusion, Item, Number, Paired, Task, Tell

if TYPE_CHECKING:
    from fledge.evaluation.subject import Subject
    from fledge.records.kinds import Message


class PreferenceAccuracy(Task):
    """How often a model ranks the preferred answer of a held-out pair higher. A tie counts one half.

    The accuracy is measured by the implicit reward of DPO, log π(y|x) − log π_ref(y|x) (Rafailov et al., 2023), against
    `reference`; of the reward model, by its score. `_likelier`: by the plain log-likelihood of the whole answer.
    A model that only continues text has no such reward. Baselines: the longer answer, and the one that the reference
    finds likelier (summed, and per token). Several pairs of one prompt are not independent: the intervals count
    prompts, not pairs.
    """

    task: Literal["preference_accuracy"] = Field("preference_accuracy", description="held-out pairs of answers")
    data: Ref[Preferences] = Field(description="held-out preferences")
    reference: Ref[Model] | None = Field(None, description="the model that DPO started from")
    reward_model: Ref[RewardModel] | None = Field(None, description="the reward model to examine beside")
    limit: Count | None = Field(None, ge=1, description="prompts at most, evenly spaced")

    def wants(self) -> Mapping[str, Ref[Any]]:
        wanted = {"reference": self.reference, "reward": self.reward_model}
        return {role: ref for role, ref in wanted.items() if ref is not None}

    def load(self, job: Job) -> list[Any]:
        from fledge.evaluation.subject import spread
        from fledge.records.shards import read

        rows: list[Any] = spread(list(read(job.open(self.data), "preferences")), self.limit)
        return [row for row in rows if any(row.pairs())]

    def tokens(self) -> float:
        return (self.limit or 400) * 120

    def ask(self, rows: list[Any], subject: Subject, seed: int, tell: Tell) -> list[Item]:
        measure = _rewards if subject.reward else _likelihoods
        values = measure(rows, subject, tell)  # for every row {answer: {...}}
        return [
            {
                "id": row.id,
                "language": row.language,
                "chat": subject.chat,
                "chosen": {"characters": len(chosen.content), **found[chosen.content]},
                "rejected": {"characters": len(rejected.content), **found[rejected.content]},
            }
            for row, found in zip(rows, values, strict=True)
            for chosen, rejected in row.pairs()
        ]

    def conclude(
        self, rows: list[Any], answers: Mapping[str, list[Item]], roles: Mapping[str, str], seed: int
    ) -> Conclusion:
        name, prompts = self.key, len(rows)
        reference, reward = answers.get(roles.get("reference", "")), roles.get("reward")
        models: dict[str, dict[str, Number]] = {}
        accuracy: dict[str, list[float]] = {}
        for model, items in answers.items():
            if model == reward:
                accuracy[model] = [_wins(_margin(item, "reward")) for item in items]
                models[model] = {name: _share(accuracy[model], prompts)}
                continue
            likelier = [_wins(_margin(item, "logprob")) for item in items]
            models[model] = {f"{name}_likelier": _share(likelier, prompts)}
            if reference is not None and items is not reference and all(item["chat"] for item in items):
                margins = [_margin(a, "logprob") - _margin(b, "logprob") for a, b in zip(items, reference, strict=True)]
                accuracy[model] = [_wins(margin) for margin in margins]
                models[model] |= {
                    name: _share(accuracy[model], prompts),
                    f"{name}_margin": sum(margins) / max(1, len(margins)),
                }
        return Conclusion(models, self._baselines(answers, reference, prompts), (Paired(name, accuracy),))

    def _baselines(
        self, answers: Mapping[str, list[Item]], reference: list[Item] | None, prompts: int
    ) -> dict[str, dict[str, Number]]:
        metric = self.key
        items = next(iter(answers.values()), [])
        found: dict[str, dict[str, Number]] = {
            "longer_answer": {metric: _share([_wins(_margin(item, "characters")) for item in items], prompts)}
        }
        if reference is not None:
            per_token = [_per_token(i["chosen"]) - _per_token(i["rejected"]) for i in reference]
            found["likelier_to_reference"] = {
                metric: _share([_wins(_margin(i, "logprob")) for i in reference], prompts)
            }
            found["likelier_to_reference_per_token"] = {metric: _share([_wins(m) for m in per_token], prompts)}
        return found


def _likelihoods(rows: list[Any], subject: Subject, tell: Tell) -> list[dict[str, Item]]:
    """The summed log-probability of every answer after its prompt, its end of turn included, as DPO is trained."""
    from fledge.evaluation.subject import clip, need_renderer

    renderer = need_renderer(subject)
    prompts, continuations, owners = [], [], []
    for index, row in enumerate(rows):
        texts = [answer.content for answer in row.answers]
        prompt, answers = renderer.render_answers(row.prompt, texts)
        for text, ids in zip(texts, answers, strict=True):
            kept, continuation = clip(prompt, ids, subject.engine.context)
            prompts.append(kept)
            continuations.append(continuation)
            owners.append((index, text))
    done = [0]

    def told(answers: int) -> None:  # the engine counts answers, we count rows
        before, done[0] = done[0] * len(rows) // len(owners), done[0] + answers
        tell(done[0] * len(rows) // len(owners) - before)

    found: list[dict[str, Item]] = [{} for _ in rows]
    for (index, text), scored in zip(owners, subject.score(prompts, continuations, told), strict=True):
        found[index][text] = {"logprob": scored.total, "tokens": len(scored.logprobs)}
    return found


def _rewards(rows: list[Any], subject: Subject, tell: Tell) -> list[dict[str, Item]]:
    """The reward model's score of every answer."""
    from fledge.evaluation.subject import chunks
    from fledge.records.kinds import Conversation, Message

    found: list[dict[str, Item]] = []
    for some in chunks(rows, 16):
        talks = [
            (i, answer.content, fitting((*row.prompt, Message("assistant", answer.content)), subject))
            for i, row in enumerate(some)
            for answer in row.answers
        ]
        rewards = subject.engine.reward([Conversation(messages) for _, _, messages in talks])
        scored: list[dict[str, Item]] = [{} for _ in some]
        for (index, text, _), reward in zip(talks, rewards, strict=True):
            scored[index][text] = {"reward": reward}
        found += scored
        tell(len(some))
    return found


def fitting(messages: tuple[Message, ...], subject: Subject) -> tuple[Message, ...]:
    """The conversation as the model can read it: the oldest turns go first, then the end of the longest message."""
    from fledge.evaluation.subject import need_renderer

    renderer = need_renderer(subject)
    while len(renderer.render(messages).ids) > subject.engine.context and any(m.content for m in messages):
        if len(messages) > 2:
            messages = messages[1:]
        else:
            long = max(messages, key=lambda message: len(message.content))
            shorter = replace(long, content=long.content[: len(long.content) * 3 // 4])
            messages = tuple(shorter if message is long else message for message in messages)
    return messages


def _margin(item: Item, key: str) -> float:
    return float(item["chosen"][key] - item["rejected"][key])


def _per_token(answer: Item) -> float:
    return float(answer["logprob"] / max(1, answer["tokens"]))


def _wins(margin: float) -> float:
    return 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0


def _share(wins: list[float], prompts: int) -> Interval:
    """The share of wins; the interval counts prompts."""
    return wilson(sum(wins) / max(1, len(wins)) * prompts, prompts if wins else 0)
