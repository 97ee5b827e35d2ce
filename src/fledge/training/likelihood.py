"""Log-probabilities of given tokens without ever holding all logits.

For N tokens and a vocabulary of V, the logits and their gradient would take 2 · N · V numbers, most of a small
model's memory. Here the output layer and the cross-entropy are done a chunk of rows at a time, in the arithmetic of
the forward pass (bf16 products under autocast, fp32 sums), and rows without a label are left out altogether.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.training.objective import Batch

IGNORED = -100
CHUNK = 2**20  # logits held at once: 4 MB in fp32, so that the passes over them stay in cache
MOST = 2**26  # 256 MB


def rows_per_chunk(vocab_size: int, width: int) -> int:
    """Rows of logits held at once: as many as stay in cache, but no fewer than the hidden states are wide, or adding to
    the weight's gradient (V · D numbers for each chunk) would cost more than the logits themselves."""
    return max(32, min(max(CHUNK // vocab_size, width), MOST // vocab_size))


@dataclass(frozen=True)
class Head:
    """An output layer: logits = cap(scale · (h Wᵀ + b)) with cap(x) = softcap · tanh(x / softcap), 0 for none.

    `weight` (V, D), `bias` (V,) or None. The scale is Cohere's and Granite's, the cap Gemma 2's.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, exact: torch.dtype) -> Tensor:
        """(n, V) in `exact`, from hidden states (n, D) and the weights in the format of the products."""
        logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
        logits = logits.to(exact)
        if self.scale != 1:
            logits = logits.mul_(self.scale)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits

    def without_cap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of h Wᵀ + b from that of the logits, in place."""
        if self.softcap:  # d/dx c·tanh(x/c) = 1 − (logits/c)²
            gradient.mul_(logits.div(self.softcap).square_().neg_().add_(1))
        return gradient.mul_(self.scale) if self.scale != 1 else gradient


class _WeightedNLL(torch.autograd.Function):
    """Σᵢ wᵢ · (−log pᵢ[yᵢ] + z · log² Zᵢ), and Σᵢ wᵢ · −log pᵢ[yᵢ] beside it, pᵢ = softmax(logitsᵢ).

    The gradients are made on the way forward, while a chunk's logits are there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        head: Head,
        z_loss: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        size = rows_per_chunk(*weight.shape)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        exact = torch.float32 if dtype != torch.float64 else dtype
        nll, squares = torch.zeros((), dtype=exact, device=hidden.device), torch.zeros((), dtype=exact)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            h = hidden[rows].to(dtype)  # (n, D)
            logits = head.logits(h, w, b, exact)  # (n, V)
            capped = logits.clone() if head.softcap else logits
            target = labels[rows, None]
            largest = logits.amax(dim=-1, keepdim=True)  # (n, 1)
            picked = logits.gather(1, target) - largest
            exponentials = logits.sub_(largest).exp_()  # in place: the logits are not needed again
            normaliser = exponentials.sum(dim=-1, keepdim=True)
            scale = weights[rows, None]
            nll += (scale * (normaliser.log() - picked)).sum()
            probability_scale = scale
            if z_loss:
                log_z = normaliser.log() + largest
                squares = squares + (scale * log_z.square()).sum()
                probability_scale = scale * (1 + 2 * z_loss * log_z)
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            gradient = exponentials.mul_(probability_scale / normaliser)  # of the logits: w · (softmax − one-hot)
            gradient.scatter_add_(1, target, -scale)
            gradient = head.without_cap(gradient, capped)
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0)
            gradient = gradient.to(dtype)
            if grad_hidden is not None:
                torch.mm(gradient, w, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += gradient.T @ h
        ctx.gradients = (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(nll)
        return nll + z_loss * squares.to(nll.device), nll

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = [None if g is None else g * upstream.to(g.dtype) for g in ctx.gradients]
        return (*scaled, None, None, None, None, None)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(logitsᵢ)[yᵢ] a row. The gradient of a row is known only later: its logits are made a second time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.head, ctx.dtype = head, dtype
        size = rows_per_chunk(*weight.shape)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        exact = torch.float32 if dtype != torch.float64 else dtype
        found = []
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            logits = head.logits(hidden[rows].to(dtype), w, b, exact)
            found.append(logits.gather(1, labels[rows, None]).squeeze(1) - torch.logsumexp(logits, dim=-1))
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=exact)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, labels = ctx.saved_tensors
        with torch.enable_grad():
            h, w, b = (
                None if value is None else value.detach().requires_grad_(needed)
                for value, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
            )
            assert h is not None and w is not None
            loss, _ = _WeightedNLL.apply(h, w, b, labels, -upstream, ctx.head, 0.0, ctx.dtype)
            loss.backward()
        return h.grad, w.grad, None if b is None else b.grad, None, None, None


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The format in which products are taken: autocast's where it is on, else the tensor's own."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def weighted_nll(
    hidden: Tensor, head: Head, labels: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Σ w · (−log p(label) + z_loss · log² Z) in nats, and Σ w · −log p(label) without gradient; scalars.

    hidden (…, D), labels (…) with −100 where there is none, weights (…) or 1. Z is the softmax's normaliser, which
    the second part holds near 1 (PaLM, Chowdhery et al., 2022, section 5; 1e-4 there).
    """
    kept = labels != IGNORED
    rows, targets = hidden[kept], labels[kept]
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scale = torch.ones_like(targets, dtype=exact) if weights is None else weights[kept].to(exact)
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _WeightedNLL.apply(
            rows, head.weight, head.bias, targets, scale, head, z_loss, dtype
        )
    return result


def token_logprobs(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """log p(label) in nats for every position, 0 where there is no label: (…), from hidden (…, D)."""
    kept = labels != IGNORED
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        found: Tensor = _TokenLogProbs.apply(hidden[kept], head.weight, head.bias, labels[kept], head, dtype)
    return torch.zeros(labels.shape, dtype=found.dtype, device=found.device).masked_scatter(kept, found)


def shifted(labels: Tensor) -> Tensor:
    """Labels for the position before them: (B, T) → (B, T), nothing to predict at the end of a row."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """The last hidden states (B, T, D) for rows padded on the right, or packed.

    Padded rows come with an `attention_mask`, and need none under causal attention: no token looks at what follows
    it. Packed rows come without, and say where documents begin by `position_ids` that restart at 0; then a
    block-diagonal causal mask keeps the documents apart.
    """
    packed = "attention_mask" not in batch and "position_ids" in batch
    positions = batch["position_ids"] if packed else None
    mask = packed_mask(batch["position_ids"]) if packed else None
    body = decoder_of(model)
    output = body(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False)
    states: Tensor = output.last_hidden_state
    return states


def packed_mask(position_ids: Tensor) -> Tensor:
    """Which key each query may see: (B, 1, T, T), true within a document and not ahead. Documents start at 0."""
    document = (position_ids == 0).cumsum(dim=-1)  # (B, T)
    same = document[:, :, None] == document[:, None, :]
    length = position_ids.shape[1]
    return (same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril())[:, None]


def decoder_of(model: Any) -> nn.Module:
    """The model without its head, adapters included."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    body: nn.Module = getattr(inner, inner.base_model_prefix)
    return body


def head_of(model: Any) -> Head:
    """The output layer as its numbers. Raises FledgeError for one that is not a linear layer."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise FledgeError(Problem(t("the output layer of this model is not linear"), found=type(layer).__name__))
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    return Head(layer.weight, layer.bias, scale, float(getattr(config, "final_logit_softcapping", None) or 0))
