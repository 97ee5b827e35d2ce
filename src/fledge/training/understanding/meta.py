"""`train.meta`: weights from which a few examples teach a task (Reptile), measured on tasks that were not there."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

from fledge.core.artifact import Model, TaskModel
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.records.chat import ChatRenderer
from fledge.training.objective import Objective, as_batch
from fledge.training.objectives.chat import Chat
from fledge.training.objectives.reptile import Inner, Reptile
from fledge.training.objectives.sequence_classification import SequenceClassification, head_logits
from fledge.training.policy import Policy, open_policy
from fledge.training.tuning import Run
from fledge.training.understanding.examples import IGNORED, Example, TaskBatches, collate
from fledge.training.understanding.opening import TaskPolicy, open_task

if TYPE_CHECKING:
    from fledge.training.understanding.stages import Meta

Family = dict[str, list[Example]]
"""Examples by class: what the classes of a task are drawn from."""


def meta(stage: Meta, job: Job) -> TaskModel | Model:
    """Train the beginning; accuracy (of answers: loss) after a few steps on held-out tasks, from it and from before."""
    run = _Meta(stage, job)
    families = run.families(stage.data, stage.shots)
    source = run.tasks(families, stage.inner_steps, stage.train.batch_size, job.rng_seed("tasks"))
    metrics: dict[str, Any] = {"families": len(families), "classes": sum(map(len, families))}
    test = None
    if stage.held_out:
        unseen = run.families([stage.held_out], stage.shots + stage.test_queries)
        test = run.tasks(unseen, stage.test_steps, 1, job.rng_seed("test"))
        metrics |= {f"plain_{name}": value for name, value in run.few_shot(test).items()}
    metrics |= run.fit(Reptile(run.inner), run.policy, source, len(source), (lambda: run.loss(test)) if test else None)
    if test:
        metrics |= run.few_shot(test)
    return run.policy.save(job, metrics)


class _Meta(Run):
    """The model, its inner loop, and the examples of its tasks."""

    def __init__(self, stage: Meta, job: Job) -> None:
        super().__init__(job, stage.train)
        self.stage = stage
        path, seed = job.open(stage.model).path, job.rng_seed("head")
        objective: Objective
        if stage.learn == "classes":
            names = [f"class {number + 1}" for number in range(stage.ways)]
            found = open_task(path, "sequence", names, stage.train, seed, self.device)
            self.policy: Policy = found
            self.pad_id, objective = found.pad_id, SequenceClassification()
        else:
            self.policy = open_policy(path, stage.train, None, seed, self.device)
            pad = self.policy.tokenizer.pad_token_id
            self.pad_id, objective = int(self.policy.tokenizer.eos_token_id if pad is None else pad), Chat()
        self.inner = Inner(objective, stage.inner_lr, stage.inner_optimizer)

    def micro_batch(self, policy: Policy) -> int:
        """Tasks are learned one after another anyway."""
        return 0

    def tasks(self, families: Sequence[Family], steps: int, tasks: int, seed: int) -> TaskBatches:
        ways = self.stage.ways if self.stage.learn == "classes" else 1
        return TaskBatches(families, ways, self.stage.shots, steps, self.stage.inner_batch, tasks, self.pad_id, seed)

    def families(self, refs: Sequence[Ref[Any]], fewest: int) -> list[Family]:
        """The examples in their groups, then by class; classes with too few for a task are left out."""
        found: dict[str, Family] = {}
        rows = self._labelled(refs) if self.stage.learn == "classes" else self._answers(refs)
        for group, name, example in rows:
            found.setdefault(group, {}).setdefault(name, []).append(example)
        ways = self.stage.ways if self.stage.learn == "classes" else 1
        enough = [{name: some for name, some in found[group].items() if len(some) >= fewest} for group in sorted(found)]
        families = [family for family in enough if len(family) >= ways]
        if not families:
            raise FledgeError(
                Problem(
                    t("there is no group with enough examples for a task"),
                    where=refs[0].text,
                    allowed=t("{ways} classes of {rows} examples each", ways=ways, rows=fewest),
                    fix=t("name more data, or ask for fewer ways, shots or test_queries"),
                )
            )
        return families

    def _labelled(self, refs: Sequence[Ref[Any]]) -> list[tuple[str, str, Example]]:
        assert isinstance(self.policy, TaskPolicy)
        encode = self.policy.encoder(self.stage.train.max_length)
        rows = [row for ref in refs for row in self.labelled(ref)]
        encoded = encode([row.text for row in rows])
        return [(self._group(row), row.label, Example(ids)) for row, ids in zip(rows, encoded, strict=True) if ids]

    def _answers(self, refs: Sequence[Ref[Any]]) -> list[tuple[str, str, Example]]:
        renderer = ChatRenderer(self.policy.tokenizer)
        length = min(self.stage.train.max_length, self.policy.context)
        made = []
        for row in (row for ref in refs for row in self.conversations(ref)):
            rendered = renderer.render(row.messages)
            ids, weights = rendered.ids[:length], rendered.weights[:length]
            labels = [i if weight > 0 else IGNORED for i, weight in zip(ids, weights, strict=True)]
            if any(label != IGNORED for label in labels[1:]):
                made.append((self._group(row), "", Example(ids, labels)))
        return made

    def _group(self, row: Any) -> str:
        key = self.stage.group
        return "" if not key else str(row.source if key == "source" else row.meta.get(key, ""))

    def few_shot(self, test: TaskBatches) -> dict[str, Any]:
        """How well tasks are known after `test_steps` on their few examples; the model is left as it was."""
        measured = [self._adapted(test, number) for number in range(self.stage.test_tasks)]
        found: dict[str, Any] = {"few_shot_loss": fmean(loss for loss, _ in measured)}
        if self.stage.learn == "classes":
            shares = [share for _, share in measured]
            found["few_shot_accuracy"] = fmean(shares)
            error = stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
            found["few_shot_accuracy_error"] = error
        return found

    def loss(self, test: TaskBatches) -> float:
        return float(self.few_shot(test)["few_shot_loss"])

    def _adapted(self, test: TaskBatches, number: int) -> tuple[float, float]:
        """The loss on a task's queries after learning it, and the share that is right (of classes)."""
        classes = self.stage.learn == "classes"
        model = copy.deepcopy(self.policy.model).eval()
        batches, asked = test.task(number, self.stage.test_queries)
        queries = as_batch(collate(asked, self.pad_id), self.device)
        with self.autocast():
            self.inner.adapt(model, as_batch(batches, self.device))
        with self.autocast(), torch.no_grad():
            loss = float(self.inner.loss(model, queries))
            right = (
                float((head_logits(model, queries).argmax(dim=-1) == queries["labels"]).double().mean())
                if classes
                else 0.0
            )
        return loss, right
