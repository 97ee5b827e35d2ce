"""`train.embed`: vectors for texts by contrastive learning, and how often a text's own partner is the nearest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fledge.core.artifact import TaskModel
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.records import shards
from fledge.records.kinds import Conversation, Document, Labelled, Preference, Record
from fledge.training.objective import as_batch, side
from fledge.training.objectives.contrastive import Contrastive, Pooling
from fledge.training.objectives.contrastive import embed as vectors_of
from fledge.training.tuning import Run
from fledge.training.understanding.examples import Encoder, PairBatches
from fledge.training.understanding.measures import retrieval_scores
from fledge.training.understanding.opening import TaskPolicy, open_task

if TYPE_CHECKING:
    from fledge.training.understanding.stages import Embed

ROWS_AT_ONCE = 32
Texts = tuple[str, ...]
SIDES = ("anchor", "positive", "negative")


def embed(stage: Embed, job: Job) -> TaskModel:
    """Train on texts or pairs; recall of held-out partners before and after."""
    run = Run(job, stage.train)
    rows = [texts for ref in stage.data for texts in _rows(run, ref)]
    if len({len(texts) for texts in rows}) > 1:
        raise FledgeError(
            Problem(
                t("texts, pairs and pairs with a negative cannot be learned from together"),
                where="data",
                fix=t("name data of one kind, or train on one after another"),
            )
        )
    if stage.train.batch_size % run.ranks.copies or run.ranks.copies != run.ranks.world:
        raise FledgeError(
            Problem(
                t("every process must have as many rows of a batch as the others"),
                where="train.batch_size",
                found=str(stage.train.batch_size),
                allowed=t("a multiple of {count}; whole or sharded copies of the model only", count=run.ranks.copies),
            )
        )
    policy = open_task(
        job.open(stage.model).path, "body", [], stage.train, job.rng_seed("head"), run.device, stage.lora
    )
    encode = policy.encoder(stage.train.max_length)
    sides = _sides(encode, rows)
    source = PairBatches(sides, stage.train.batch_size, policy.pad_id, job.rng_seed("order"))
    if source.batch_size < 2 or source.batch_size % run.ranks.copies:
        raise FledgeError(Problem(t("there are too few texts to tell apart"), where="data", found=str(source.rows)))
    if len(sides) == 1 and not drops_out(policy.model):
        raise FledgeError(
            Problem(
                t("without dropout a text and itself give the same vector: there is nothing to learn"),
                where="train.dropout",
                fix=t("give it some, {example}, or name pairs as data", example="dropout: {hidden: 0.1}"),
            )
        )
    held = PairBatches(_sides(encode, _held_out(run, stage)), 2, policy.pad_id, 0) if stage.held_out else None
    objective = Contrastive(stage.temperature, stage.pooling, run.micro_batch(policy), run.ranks)
    metrics: dict[str, Any] = {"rows": source.rows, "hard_negatives": len(sides) == 3}
    if held:
        before = retrieval_scores(*pair_vectors(policy, held, stage.pooling, run))
        metrics |= {f"{name}_before": value for name, value in before.items()}

    def loss() -> float:
        assert held is not None
        anchors, partners = pair_vectors(policy, held, stage.pooling, run)
        log_share = torch.log_softmax(anchors @ partners.T / stage.temperature, dim=-1)
        return float(-log_share.diagonal().mean())

    metrics |= run.fit(objective, policy, source, len(source), loss if held else None)
    if held:
        metrics |= {"held_out_rows": held.rows, **retrieval_scores(*pair_vectors(policy, held, stage.pooling, run))}
    policy.config = {"pooling": stage.pooling}
    return policy.save(job, metrics)


def pair_vectors(policy: TaskPolicy, pairs: PairBatches, pooling: Pooling, run: Run) -> tuple[Tensor, Tensor]:
    """Unit vectors of all anchors and of all their partners: (N, D) each."""
    policy.model.eval()
    found: dict[str, list[Tensor]] = {"anchor": [], "positive": []}
    for start in range(0, pairs.rows, ROWS_AT_ONCE):
        batch = as_batch(pairs.of(np.arange(start, min(pairs.rows, start + ROWS_AT_ONCE))), run.device)
        with torch.inference_mode(), run.autocast():
            for name, parts in found.items():
                parts.append(vectors_of(policy.model, side(batch, name), pooling).cpu())
    return torch.cat(found["anchor"]), torch.cat(found["positive"])


def drops_out(model: nn.Module) -> bool:
    """Whether anything in the model is random while it is trained."""
    layers = [layer for layer in model.modules() if not isinstance(layer, nn.Identity)]
    shares = [layer.p for layer in layers if isinstance(layer, nn.Dropout)]
    shares += [share for layer in layers if isinstance(share := getattr(layer, "attention_dropout", None), float)]
    return any(share > 0 for share in shares)


def pairs_in(record: Record) -> Iterator[Texts]:
    """A record's texts: one that stands for itself, a question and its answer, a prompt with a good and a bad one."""
    match record:
        case Document() | Labelled():
            yield (record.text,)
        case Conversation():
            turns = record.messages
            for question, answer in pairwise(turns):
                if (question.role, answer.role) == ("user", "assistant") and question.content and answer.content:
                    yield question.content, answer.content
        case Preference():
            ranked = sorted(record.answers, key=lambda answer: answer.rank)
            if ranked[0].rank < ranked[-1].rank and record.prompt:
                yield record.prompt[-1].content, ranked[0].content, ranked[-1].content


def halves(text: str) -> Texts:
    """A text's first half and its second, cut at a white space where there is one near."""
    middle = len(text) // 2
    spaces = [i for i in range(len(text) // 4, 3 * len(text) // 4) if text[i].isspace()]
    cut = min(spaces, key=lambda i: abs(i - middle), default=middle)
    return text[:cut].strip(), text[cut:].strip()


def _rows(run: Run, ref: Ref[Any], limit: int | None = None) -> list[Texts]:
    source = run.job.open(ref)
    found: list[Texts] = []
    for record in shards.read(source, shards.kind_in(source)):
        found += [texts for texts in pairs_in(record) if all(map(str.strip, texts))]
        if limit and len(found) >= limit:
            return found[:limit]
    if not found:
        raise FledgeError(Problem(t("there is nothing to learn from"), where=str(source.path)))
    return found


def _held_out(run: Run, stage: Embed) -> list[Texts]:
    assert stage.held_out is not None
    rows = _rows(run, stage.held_out, stage.held_out_rows)
    pairs = [halves(texts[0]) if len(texts) == 1 else texts[:2] for texts in rows]
    return [pair for pair in pairs if all(pair)]


def _sides(encode: Encoder, rows: Sequence[Texts]) -> dict[str, list[list[int]]]:
    encoded = {name: encode(column) for name, column in zip(SIDES, zip(*rows, strict=True), strict=False)}
    whole = [row for row in range(len(rows)) if all(ids[row] for ids in encoded.values())]
    return {name: [ids[row] for row in whole] for name, ids in encoded.items()}
