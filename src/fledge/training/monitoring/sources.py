"""Losses by source: how well a mixture's parts are learned, each on its own, out of the same forward pass.

A batch says with `source` where its rows (B,) or its tokens (B, T) come from, as numbers from 0; the batch source's
`sources` are the names. An objective that asks `by_source` measures one part after another, and their sum is the
loss: no token is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fledge.training.objective import Batch, Term

KEY = "source"
PREFIX = "source."
"""of the terms that are only measured; a rank that holds no row of a source adds nothing to it"""
IGNORED = -100

Parts = Mapping[int, tuple[Tensor, Tensor]]


def by_source(
    batch: Batch, targets: Tensor, measure: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[tuple[Tensor, Tensor], dict[str, Term]]:
    """Two sums over all `targets` (B, T), −100 where there is none, and a term for each source of the second of them.

    `measure` gives both sums for some of the targets. Without a `source` in the batch it is asked once.
    """
    if KEY not in batch:
        return measure(targets), {}
    rows = batch[KEY]
    if rows.ndim == 1:
        origin = rows[:, None].expand_as(targets)
    else:  # a token is predicted at the position before it; of parts of rows it is said already
        origin = rows if "targets" in batch else torch.roll(rows, -1, dims=1)
    totals: list[Tensor] = []
    measured: list[Tensor] = []
    terms: dict[str, Term] = {}
    for number in torch.unique(origin[targets != IGNORED]).tolist():
        mine = torch.where(origin == number, targets, IGNORED)
        total, only = measure(mine)
        totals.append(total)
        measured.append(only)
        weight = float((mine != IGNORED).sum())
        terms[f"{PREFIX}{int(number)}"] = Term(only.detach(), weight, coefficient=0.0)
    if not totals:
        return measure(targets), {}
    return (torch.stack(totals).sum(), torch.stack(measured).sum()), terms


class Means(dict[str, float]):
    """The terms' means over a step, and the weights they stand for, by which a longer stretch is averaged."""

    def __init__(self, means: Mapping[str, float], weights: Mapping[str, float]) -> None:
        super().__init__(means)
        self.weights = {name: weight for name, weight in weights.items() if name.startswith(PREFIX)}


def expected(batch: Batch, names: Sequence[str]) -> dict[str, list[float]]:
    """A place for every source, in one order, so that all processes add up the same table. Empty without sources."""
    if KEY not in batch:
        return {}
    numbers = range(len(names)) if names else torch.unique(batch[KEY]).tolist()
    return {f"{PREFIX}{int(number)}": [0.0, 0.0] for number in numbers}


def named(term: str, names: Sequence[str]) -> str:
    """What a term is called in the curves: `source.1` → `loss/zh`."""
    if not term.startswith(PREFIX):
        return term
    number = int(term.removeprefix(PREFIX))
    return f"loss/{names[number] if number < len(names) else number}"
