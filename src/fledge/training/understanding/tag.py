"""`train.tag`: entities in texts by a tag for every word, and how many are found whole on texts it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fledge.core.artifact import TaskModel
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.records.entities import Entity, entities_of
from fledge.training.objectives.token_classification import TokenClassification
from fledge.training.tuning import Run
from fledge.training.understanding.classify import ask
from fledge.training.understanding.examples import IGNORED, Encoder, Example, ExampleBatches
from fledge.training.understanding.measures import entity_scores
from fledge.training.understanding.opening import TaskPolicy, open_task
from fledge.training.understanding.words import Align, Words, aligned, labels_of, tagged_example

if TYPE_CHECKING:
    from fledge.training.understanding.stages import Tag

Marked = tuple[str, list[Entity]]


def tag(stage: Tag, job: Job) -> TaskModel:
    """Train on texts with entities; F1 of whole entities on held-out texts, by type as well."""
    run = Run(job, stage.train)
    marked, spoilt = _marked(run, stage.data)
    labels = labels_of([entity.type for _, entities in marked for entity in entities])
    if len(labels) < 2:
        raise FledgeError(
            Problem(
                t("no entity is marked in these texts"),
                where="data",
                allowed='{"tokens": […], "tags": ["B-PER", …]}, {"text": …, "entities": [{"start", "end", "type"}]}',
            )
        )
    policy = open_task(
        job.open(stage.model).path, "tokens", labels, stage.train, job.rng_seed("head"), run.device, stage.lora
    )
    encode = policy.encoder(stage.train.max_length)
    numbers = {label: number for number, label in enumerate(labels)}
    examples = [tagged_example(encode, text, entities, numbers, stage.align) for text, entities in marked]
    usable = [e for e in examples if isinstance(e.label, Sequence) and any(number != IGNORED for number in e.label)]
    source = ExampleBatches(usable, stage.train.batch_size, policy.pad_id, job.rng_seed("order"))
    held = _marked(run, [stage.held_out], stage.held_out_rows)[0] if stage.held_out else []
    unseen = [tagged_example(encode, text, entities, numbers, stage.align) for text, entities in held]

    def loss() -> float:
        gold = torch.tensor([number for e in unseen for number in (e.label if isinstance(e.label, Sequence) else [])])
        return float(F.cross_entropy(ask(policy, unseen, run), gold, ignore_index=IGNORED))

    metrics: dict[str, Any] = {
        "rows": len(usable),
        "dropped_rows": len(marked) - len(usable) + spoilt,
        "labels": labels,
    }
    metrics["overlapping_entities"] = sum(len(e) - _kept(text, e) for text, e in marked)
    metrics |= run.fit(TokenClassification(), policy, source, len(source), loss if held else None)
    if held:
        found = find(policy, encode, [text for text, _ in held], labels, stage.align, run)
        metrics |= {"held_out_rows": len(held), "held_out_loss": loss()}
        metrics |= entity_scores([entities for _, entities in held], found)
    policy.config = {"tag_align": stage.align}
    return policy.save(job, metrics)


def find(
    policy: TaskPolicy, encode: Encoder, texts: Sequence[str], labels: Sequence[str], align: Align, run: Run
) -> list[list[Entity]]:
    """The entities that the model finds in each text, in code points."""
    cut = [Words.of(text) for text in texts]
    rows = [aligned(encode, words, align) for words in cut]
    best = ask(policy, [Example(ids, [0] * len(ids)) for ids, _ in rows], run).argmax(dim=-1).tolist()
    found, at = [], 0
    for words, (ids, carries) in zip(cut, rows, strict=True):
        tags = ["O"] * len(words.places)
        for number, word in zip(best[at : at + len(ids)], carries, strict=True):
            if word is not None:
                tags[word] = labels[number]
        at += len(ids)
        found.append(words.entities(tags))
    return found


def _marked(run: Run, refs: Sequence[Ref[Any]], limit: int | None = None) -> tuple[list[Marked], int]:
    """Texts with their entities, and how many rows had none that fit."""
    rows = [row for ref in refs for row in run.labelled(ref, limit)]
    read = [(row.text, entities_of(row)) for row in rows]
    return [(text, entities) for text, entities in read if entities is not None], sum(e is None for _, e in read)


def _kept(text: str, entities: list[Entity]) -> int:
    """How many of a text's entities its tags can say: those that overlap no longer one."""
    return sum(tag.startswith("B-") for tag in Words.of(text).tags(entities))
