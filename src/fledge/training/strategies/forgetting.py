"""Forgetting, measured: how much worse a model does on general data after a training than before it.

For every named data set: the loss on the answers of conversations (nats a token) or bits per byte of texts, before,
after, and the difference of the two on the same rows with a 95 % interval (a paired bootstrap over the rows). A
difference whose interval lies above 0 is forgetting that chance does not explain.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any, cast

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError, Problem
from fledge.core.intervals import ratio_interval
from fledge.core.job import Job
from fledge.core.language import t
from fledge.records import shards
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation, Document
from fledge.training.held_out import answer_nlls, text_nlls
from fledge.training.strategies.settings import Forgetting

Measured = list[tuple[float, float]]
"""Of every row, what was lost in all (nats, or bits) and over how many (tokens, or bytes)."""


class Watch:
    """What a stage's `forgetting` block asks for.

    `length` is the most tokens of a conversation that are read. Made and asked once before the training: `before` is
    then known, and `compare` gives the metrics after it.
    """

    def __init__(self, job: Job, settings: Forgetting | None, tokenizer: Any, length: int, dtype: str) -> None:
        self.job, self.tokenizer, self.length, self.dtype = job, tokenizer, length, dtype
        data = settings.data if settings else {}
        self.rows = {name: _rows(job.open(ref), settings.rows) for name, ref in data.items()} if settings else {}
        self.before: dict[str, Measured] = {}

    def measure(self, model: Any) -> dict[str, Measured]:
        """Row by row, what the model loses on every data set."""
        found: dict[str, Measured] = {}
        for done, (name, rows) in enumerate(self.rows.items()):
            self.job.events.progress(done, len(self.rows), "general data sets")
            if isinstance(rows[0], Conversation):
                losses = answer_nlls(model, ChatRenderer(self.tokenizer), rows, self.length, self.dtype)
                found[name] = [(nats, float(tokens)) for nats, tokens in losses]
            else:
                texts = [cast(Document, row).text for row in rows]
                losses = text_nlls(model, self.tokenizer, texts, dtype=self.dtype)
                sizes = [float(len(text.encode())) for text in texts]
                found[name] = [(nats / math.log(2), size) for (nats, _), size in zip(losses, sizes, strict=True)]
            if not sum(weight for _, weight in found[name]):
                raise FledgeError(Problem(t("there is nothing to measure"), where=f"forgetting.data.{name}"))
        return found

    def start(self, model: Any) -> None:
        """Measure the model as it is before the training."""
        if self.rows:
            self.job.events.message(t("measuring what the model knows of general data"))
            self.before = self.measure(model)

    def compare(self, model: Any) -> dict[str, float]:
        """The metrics `forgetting_NAME` (after − before; positive: forgotten), `…_low` and `…_high`, `…_before` and
        `…_after`; a warning for every data set on which the model has become worse beyond doubt."""
        metrics: dict[str, float] = {}
        for name, after in (self.measure(model) if self.rows else {}).items():
            losses, weights = zip(*after, strict=True)
            earlier = [loss for loss, _ in self.before[name]]
            change = ratio_interval(
                [b - a for a, b in zip(earlier, losses, strict=True)], weights, self.job.rng_seed("forgetting", name)
            )
            total = sum(weights)
            key = f"forgetting_{name}"
            metrics |= {
                key: change.value, f"{key}_low": change.low, f"{key}_high": change.high,
                f"{key}_before": sum(earlier) / total, f"{key}_after": sum(losses) / total,
            }  # fmt: skip
            if change.low > 0:
                self.job.events.message(_warning(name, metrics, key), "warning")
        return metrics


def _warning(name: str, metrics: dict[str, float], key: str) -> str:
    return t(
        "{name} has been forgotten in part: {before} before, {after} after; replay, ewc, l2_sp or a lower learning "
        "rate keep more of it",
        name=name,
        before=f"{metrics[f'{key}_before']:.3f}",
        after=f"{metrics[f'{key}_after']:.3f}",
    )


def _rows(source: Artifact, limit: int) -> list[Any]:
    kind = shards.kind_in(source)
    found = [row for row in islice(shards.read(source, kind), limit) if getattr(row, "text", "-")]
    if kind not in ("conversations", "documents") or not found:
        raise FledgeError(
            Problem(
                t("forgetting is measured on conversations or on texts"), where=str(source.path),
                found=kind if found else t("no rows"), allowed="conversations | documents",
            )
        )  # fmt: skip
    return found
