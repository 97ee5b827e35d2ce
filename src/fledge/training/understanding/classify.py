"""`train.classify`: a class for every text, and how often it is the right one on texts it has not seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.core.artifact import TaskModel
from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.job import Job
from fledge.core.language import t
from fledge.training.objective import as_batch
from fledge.training.objectives.sequence_classification import SequenceClassification, head_logits
from fledge.training.tuning import Run
from fledge.training.understanding.examples import Example, ExampleBatches, collate
from fledge.training.understanding.measures import class_scores
from fledge.training.understanding.opening import TaskPolicy, open_task

if TYPE_CHECKING:
    from fledge.training.understanding.stages import Classify

TOKENS_AT_ONCE = 8192


def classify(stage: Classify, job: Job) -> TaskModel:
    """Train the head and the body (or an adapter) on labelled texts; accuracy and F1 on held-out ones."""
    run = Run(job, stage.train)
    rows = [row for ref in stage.data for row in run.labelled(ref)]
    labels = sorted({row.label for row in rows})
    if len(labels) < 2:
        raise FledgeError(Problem(t("there are no two classes to tell apart"), where="data", found=listing(labels)))
    policy = open_task(
        job.open(stage.model).path, "sequence", labels, stage.train, job.rng_seed("head"), run.device, stage.lora
    )
    encode = policy.encoder(stage.train.max_length)
    numbers = {label: number for number, label in enumerate(labels)}
    examples = [Example(ids, numbers[row.label]) for row, ids in zip(rows, encode([r.text for r in rows]), strict=True)]
    usable = [example for example in examples if example.ids]
    counts = Counter(labels[example.label] for example in usable if isinstance(example.label, int))
    weights = class_weights(stage.class_weights, labels, counts)
    source = ExampleBatches(usable, stage.train.batch_size, policy.pad_id, job.rng_seed("order"))
    held = run.labelled(stage.held_out, stage.held_out_rows) if stage.held_out else []
    gold = [numbers.get(row.label, -1) for row in held]
    unseen = [Example(ids or [policy.pad_id]) for ids in encode([row.text for row in held])]

    def logits() -> Tensor:
        return ask(policy, unseen, run)

    def loss() -> float:
        known = torch.tensor(gold) >= 0
        return float(F.cross_entropy(logits()[known], torch.tensor(gold)[known]))

    objective = SequenceClassification(weights, stage.label_smoothing)
    metrics: dict[str, Any] = {"rows": len(usable), "dropped_rows": len(rows) - len(usable), "labels": labels}
    metrics |= run.fit(objective, policy, source, len(source), loss if held else None)
    if held:
        metrics |= {"held_out_rows": len(held), "held_out_loss": loss()}
        metrics |= class_scores(gold, logits().argmax(dim=-1).tolist(), labels)
    return policy.save(job, metrics)


def class_weights(asked: Any, labels: Sequence[str], counts: Counter[str]) -> list[float]:
    """The classes' weights in the order of `labels`, empty where all are 1. Raises FledgeError for unknown classes."""
    if not asked:
        return []
    if asked == "balanced":
        return [counts.total() / (len(labels) * counts[label]) for label in labels]
    if unknown := sorted(set(asked) - set(labels)):
        raise FledgeError(
            Problem(
                t("no text has this class"), where="class_weights", found=listing(unknown), allowed=listing(labels, 40)
            )
        )
    return [asked.get(label, 1.0) for label in labels]


def ask(policy: TaskPolicy, examples: Sequence[Example], run: Run) -> Tensor:
    """The head's logits for every text, batched by length, in the texts' order: (N, K) in fp32."""
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index].ids), index))
    found: dict[int, Tensor] = {}
    while order:
        longest = len(examples[order[-1]].ids)
        taken = order[-max(1, TOKENS_AT_ONCE // longest) :]
        del order[-len(taken) :]
        batch = as_batch(collate([examples[index] for index in taken], policy.pad_id), run.device)
        with torch.inference_mode(), run.autocast():
            for index, logits in zip(taken, head_logits(policy.model, batch).cpu(), strict=True):
                found[index] = logits[: len(examples[index].ids)] if logits.ndim == 2 else logits
    ordered = [found[index] for index in range(len(examples))]
    return torch.stack(ordered) if ordered and ordered[0].ndim == 1 else torch.cat(ordered)
