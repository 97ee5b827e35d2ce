"""Contrastive learning: a text's vector should lie nearer to its partner's than to those of all others in the batch.

    loss = −E [ log ( exp(cos(a, p) / τ) / Σⱼ exp(cos(a, cⱼ) / τ) ) ]            InfoNCE (van den Oord et al., 2018)

The candidates c are the partners of the whole batch, and the hard negatives where there are any (Gao et al., 2021,
eq. 5). Without partners a text is its own: it is read twice, and dropout makes the difference (their eq. 4).

A row's loss depends on the other rows, so the batch is part of the result. It is the batch of the recipe and nothing
smaller: the vectors of all processes are gathered, with gradients, and where memory is short the texts are read
`rows_at_once` at a time and a second time for the backward pass, with the same dropout (Gao, Zhang et al., 2021),
which changes nothing but the time it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fledge.training.layout.ranks import Ranks
from fledge.training.objective import Batch, Objective, Term, rows_of, side, take
from fledge.training.objectives.sequence_classification import no_cache

Pooling: TypeAlias = Literal["mean", "last", "cls"]


class Contrastive(Objective):
    """Batches: `anchor`, and `positive` and `negative` where there are any, each `input_ids` and `attention_mask`.

    The model: a body without a head. Every process must have as many rows as the others.
    """

    rows_independent: ClassVar[bool] = False

    def __init__(self, temperature: float, pooling: Pooling, rows_at_once: int = 0, ranks: Ranks | None = None) -> None:
        self.temperature, self.pooling, self.rows_at_once = temperature, pooling, rows_at_once
        self.ranks = ranks or Ranks()

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"infonce": float(rows_of(batch))}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors of our anchors (b, D), and those of the candidates of all processes, partners first (M, D)."""
        model, anchors = models["model"], side(batch, "anchor")
        own = self.vectors(model, anchors)
        partners = gather(self.vectors(model, side(batch, "positive") or anchors), self.ranks)
        hard = side(batch, "negative")
        return own, torch.cat([partners, gather(self.vectors(model, hard), self.ranks)]) if hard else partners

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Term]:
        own, candidates = outputs
        similarity = own @ candidates.T / self.temperature  # (b, M)
        partner = torch.arange(len(own), device=own.device) + len(own) * self.ranks.copy
        right = (similarity.argmax(dim=-1) == partner).sum()
        return {
            "infonce": Term(F.cross_entropy(similarity, partner, reduction="sum"), len(own)),
            "accuracy": Term(right, len(own), coefficient=0.0),
        }

    def vectors(self, model: Any, texts: Batch) -> Tensor:
        """Unit vectors (b, D), read `rows_at_once` at a time; then no more activations than theirs are held."""
        size = self.rows_at_once or rows_of(texts)
        if size >= rows_of(texts) or not torch.is_grad_enabled():
            return embed(model, texts, self.pooling)
        parts = (take(texts, slice(start, start + size)) for start in range(0, rows_of(texts), size))
        return torch.cat([checkpoint(embed, model, part, self.pooling, use_reentrant=False) for part in parts])


def embed(model: Any, texts: Batch, pooling: Pooling) -> Tensor:
    """The texts' unit vectors, in fp32 at least: (B, D)."""
    mask = texts["attention_mask"]
    hidden = model(input_ids=texts["input_ids"], attention_mask=mask, **no_cache(model)).last_hidden_state  # (B, T, D)
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    if pooling == "cls":
        found = hidden[:, 0]
    elif pooling == "last":
        found = hidden[torch.arange(len(mask), device=mask.device), mask.sum(dim=-1) - 1]
    else:
        found = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.normalize(found, dim=-1)


class _Gather(torch.autograd.Function):
    """The rows of all processes, one after another; the gradient of ours is the sum of what all of them find."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.count = ranks, len(rows)
        parts = [torch.empty_like(rows) for _ in range(ranks.copies)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        whole = gradient.contiguous()
        ctx.ranks.sum([whole])
        return whole[ctx.count * ctx.ranks.copy : ctx.count * (ctx.ranks.copy + 1)], None


def gather(rows: Tensor, ranks: Ranks) -> Tensor:
    """(b, D) of every process → (b · processes, D) on every process, differentiable."""
    return rows if ranks.copies == 1 else _Gather.apply(rows, ranks)
