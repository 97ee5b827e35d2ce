"""What an `ewc` block asks for: the Fisher information of the old task's rows, and the penalty made of it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.data.tokens.batches import Batch, padded
from fledge.records import shards
from fledge.records.chat import ChatRenderer, Rendered
from fledge.records.kinds import Conversation, Document
from fledge.training.held_out import encode, separator_id
from fledge.training.layout.ranks import Ranks
from fledge.training.objective import as_batch
from fledge.training.policy import Policy
from fledge.training.strategies.fisher import fisher_diagonal
from fledge.training.strategies.penalty import ElasticWeights
from fledge.training.strategies.settings import EWC

FILE = "fisher.safetensors"


def consolidate(
    job: Job, ewc: EWC | None, policy: Policy, length: int, ranks: Ranks, device: str
) -> list[ElasticWeights]:
    """The penalty for `policy` as it is now, or none. The model is `model` to the Trainer."""
    if ewc is None:
        return []
    rows = [as_batch(row, device) for row in old_rows(job.open(ewc.data), policy.tokenizer, ewc.rows, length)]
    job.events.message(t("estimating the Fisher information of {count} rows of the old task", count=len(rows)))
    half = next(policy.model.parameters()).dtype != torch.float32  # the base of an adapter: products are taken in bf16
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
        fisher = fisher_diagonal(
            policy.model, rows, job.work / FILE, ranks,
            progress=lambda done, total: job.events.progress(done, total, "rows of the old task"),
        )  # fmt: skip
    return [ElasticWeights(ewc.strength, {f"model.{name}": value for name, value in fisher.items()})]


def old_rows(source: Artifact, tokenizer: Any, limit: int, length: int) -> list[Batch]:
    """The first rows of an old task, one a batch: answers of conversations, or the first `length` tokens of texts.

    Raises FledgeError where nothing is to be learned from any of them.
    """
    kind = shards.kind_in(source)
    records = list(islice(shards.read(source, kind), limit))
    renderer = ChatRenderer(tokenizer) if kind == "conversations" else None
    rendered = []
    for record in records:
        if isinstance(record, Conversation) and renderer:
            rendered.append(renderer.render(record.messages))
        elif isinstance(record, Document):
            ids = [separator_id(tokenizer), *next(iter(encode(tokenizer, [record.text])))]
            rendered.append(Rendered(ids, [1.0] * len(ids)))
    taught = [row for row in rendered if any(weight > 0 for weight in row.weights[1:length])]
    if not taught:
        raise FledgeError(
            Problem(t("nothing is to be learned from the rows of the old task"), where="ewc.data", found=kind,
                    allowed="conversations | documents")
        )  # fmt: skip
    return [padded([row], length, 0) for row in taught]
