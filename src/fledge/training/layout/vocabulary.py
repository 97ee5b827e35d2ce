"""Loss parallelism: the cross-entropy where every process holds the output layer's rows for a part of the vocabulary.

Logits are never gathered: of a row, the processes tell each other the largest logit, the sum of exponentials and the
label's logit, three numbers. As on one process the logits are made a chunk of rows at a time, so each process holds a
chunk of V / n of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fledge.training.layout.tensor import first_row, local_part

if TYPE_CHECKING:
    from fledge.training.likelihood import Head

CHUNK = 2**22  # logits held at once: 16 MB in fp32; every chunk costs two messages


def nll_of_parts(
    hidden: Tensor, head: Head, labels: Tensor, weights: Tensor, z_loss: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Σ w · (−log p(label) + z_loss · log² Z) and Σ w · −log p(label), the same on every process.

    hidden (n, D), the same everywhere; `head.weight` a DTensor (V, D) divided by rows; labels (n,), weights (n,).
    """
    weight, bias, group, first = _parts(head)
    found: tuple[Tensor, Tensor] = _NLL.apply(hidden, weight, bias, labels, weights, head, z_loss, dtype, group, first)
    return found


def logprobs_of_parts(hidden: Tensor, head: Head, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """log p(label) of every row: (n,), the same on every process."""
    weight, bias, group, first = _parts(head)
    found: Tensor = _LogProbs.apply(hidden, weight, bias, labels, head, dtype, group, first)
    return found


def _parts(head: Head) -> tuple[Tensor, Tensor | None, Any, int]:
    assert isinstance(head.weight, DTensor)
    bias = head.bias.to_local() if isinstance(head.bias, DTensor) else head.bias
    return local_part(head.weight), bias, head.weight.device_mesh.get_group(), first_row(head.weight)


class _Rows:
    """The softmax of some rows, of which the logits for a part of the vocabulary are here."""

    def __init__(self, head: Head, h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, first: int, group: Any):
        exact = torch.float64 if h.dtype == torch.float64 else torch.float32
        self.logits = head.logits(h, w, b, exact)  # (n, V / processes)
        none = torch.full((len(h), 1), -torch.inf, dtype=exact, device=h.device)
        self.largest = self.logits.amax(dim=-1, keepdim=True) if w.shape[0] else none
        dist.all_reduce(self.largest, dist.ReduceOp.MAX, group)
        self.here = ((labels >= first) & (labels < first + w.shape[0]))[:, None]  # (n, 1)
        self.target = (labels - first).clamp(0, max(0, w.shape[0] - 1))[:, None]
        picked = self.logits.gather(1, self.target) - self.largest if w.shape[0] else torch.zeros_like(none)
        self.exponentials = (self.logits - self.largest).exp_()
        told = torch.cat([self.exponentials.sum(dim=-1, keepdim=True), torch.where(self.here, picked, 0.0)], dim=1)
        dist.all_reduce(told, group=group)
        self.normaliser, self.picked = told[:, :1], told[:, 1:]
        self.logprobs = self.picked - self.normaliser.log()  # (n, 1)

    def gradient(self, head: Head, scale: Tensor, probability_scale: Tensor) -> Tensor:
        """Of the logits that are here: probability_scale · softmax − scale · one-hot."""
        gradient = self.exponentials.mul_(probability_scale / self.normaliser)
        if gradient.shape[1]:
            gradient.scatter_add_(1, self.target, torch.where(self.here, -scale, 0.0))
        return head.without_cap(gradient, self.logits)


class _NLL(torch.autograd.Function):
    """`likelihood._WeightedNLL` on parts of the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor, head: Head,
        z_loss: float, dtype: torch.dtype, group: Any, first: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        nll, squares = (torch.zeros((), dtype=exact, device=hidden.device) for _ in range(2))
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_any = wants_hidden or wants_weight or wants_bias
        grad_hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device) if wants_any else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        size = max(32, CHUNK // max(1, len(w)))
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            h, scale = hidden[rows].to(dtype), weights[rows, None]
            found = _Rows(head, h, w, b, labels[rows], first, group)
            nll -= (scale * found.logprobs).sum()
            probability_scale = scale
            if z_loss:
                log_z = found.normaliser.log() + found.largest
                squares += (scale * log_z.square()).sum()
                probability_scale = scale * (1 + 2 * z_loss * log_z)
            if grad_hidden is None:
                continue
            gradient = found.gradient(head, scale, probability_scale)
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0)
            gradient = gradient.to(dtype)
            grad_hidden[rows] = (gradient @ w).to(exact)
            if grad_weight is not None:
                grad_weight += gradient.T @ h
        if grad_hidden is not None:
            dist.all_reduce(grad_hidden, group=group)
        ctx.gradients = (
            grad_hidden.to(hidden.dtype) if grad_hidden is not None and wants_hidden else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(nll)
        return nll + z_loss * squares, nll

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = [None if g is None else g * upstream.to(g.dtype) for g in ctx.gradients]
        return (*scaled, None, None, None, None, None, None, None)


class _LogProbs(torch.autograd.Function):
    """`likelihood._TokenLogProbs` on parts of the vocabulary: the logits are made a second time on the way back."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head, dtype: torch.dtype,
        group: Any, first: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.rest = head, dtype, group, first
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        size = max(32, CHUNK // max(1, len(w)))
        found = [
            _Rows(head, hidden[s : s + size].to(dtype), w, b, labels[s : s + size], first, group).logprobs.squeeze(1)
            for s in range(0, len(labels), size)
        ]
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=exact)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, labels = ctx.saved_tensors
        head, dtype, group, first = ctx.rest
        with torch.enable_grad():
            h, w, b = (
                None if value is None else value.detach().requires_grad_(needed)
                for value, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
            )
            loss, _ = _NLL.apply(h, w, b, labels, -upstream, head, 0.0, dtype, group, first)
            loss.backward()
        assert h is not None and w is not None
        return h.grad, w.grad, None if b is None else b.grad, None, None, None, None, None
