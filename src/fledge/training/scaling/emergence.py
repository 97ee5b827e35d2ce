"""Emergence, seen twice: a continuous and a thresholded measure of the same models (Schaeffer et al., 2023).

A token is right with probability p; k tokens in a row are all right about p^k of the time. Where p rises smoothly with
scale, p^k stays near 0 for long and then "jumps": the jump is the measure's, not the model's. Here both are taken of
the same models on the same text, the next token always predicted from the true text before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fledge.core.artifact import Model
from fledge.core.job import Job
from fledge.core.language import t
from fledge.training.scaling.law import Point

if TYPE_CHECKING:
    from fledge.training.scaling.stages import Emergence

LONGEST = 256  # tokens of a text


@dataclass(frozen=True)
class Measured:
    """One model on the held-out text: nats a token, and how often k tokens in a row are all right, by k."""

    name: str
    parameters: float
    tokens: float
    nll: float
    exact: Mapping[int, float] = field(default_factory=dict)


def emergence(runs: Sequence[Measured], lengths: Sequence[int]) -> dict[str, Any]:
    """How sudden each measure is over the runs, ordered by their operations, and what p^k alone would make of it."""
    ordered = sorted(runs, key=lambda run: run.parameters * run.tokens)
    curves = {"nll": [run.nll for run in ordered]}
    curves |= {f"exact_{k}": [run.exact[k] for run in ordered] for k in lengths}
    single = [run.exact[1] for run in ordered] if 1 in lengths else []
    expected = {f"exact_{k}": [p**k for p in single] for k in lengths if single}
    return {
        "emergence": [asdict(run) for run in ordered],
        "suddenness": {name: suddenness(values) for name, values in curves.items()},
        "expected_from_single_tokens": expected,
    }


def suddenness(values: Sequence[float]) -> float:
    """The largest step between neighbours as a share of the whole way, times the number of steps: 1 is even."""
    steps = [b - a for a, b in pairwise(values)]
    way = abs(values[-1] - values[0])
    return max((abs(step) for step in steps), default=0.0) / way * len(steps) if way else 0.0


def measure_runs(runs: Sequence[tuple[Point, Model]], asked: Emergence, job: Job) -> list[Measured]:
    """Both measures of every model on the held-out text."""
    from fledge.models.load import load_model, load_tokenizer
    from fledge.records import shards
    from fledge.training.held_out import encode, separator_id
    from fledge.training.layout.ranks import device_of

    source = shards.read(job.open(asked.data), "documents")
    texts = [str(record.text) for record in islice(source, asked.texts)]  # type: ignore[union-attr]
    found = []
    for number, (point, folder) in enumerate(runs, 1):
        job.events.progress(number, len(runs), t("models"))
        tokenizer = load_tokenizer(folder.path)
        model = load_model(folder.path, "float32", device_of(job.execution))
        rows = [[separator_id(tokenizer), *ids[: LONGEST - 1]] for ids in encode(tokenizer, texts) if ids]
        nll, exact = measure(model, rows, asked.lengths)
        found.append(Measured(point.name, point.parameters, point.tokens, nll, exact))
    return found


@torch.no_grad()
def measure(model: Any, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[float, dict[int, float]]:
    """Nats a token, and the share of runs of k tokens (without overlap) that are all right."""
    total, count = 0.0, 0
    right: dict[int, list[int]] = {k: [0, 0] for k in lengths}
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
        targets = ids[0, 1:]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
        hits = (logits.argmax(dim=-1) == targets).int()
        for k in lengths:
            whole = hits[: len(hits) // k * k].view(-1, k).prod(dim=1)
            right[k][0] += int(whole.sum())
            right[k][1] += len(whole)
    return total / max(1, count), {k: hit / max(1, tries) for k, (hit, tries) in right.items()}
