"""Log-probabilities of given tokens without ever holding all logits.

For N tokens and a vocabulary of V, the logits and their gradient would take 2 · N · V numbers, most of a small
model's memory. Here the output layer and the cross-entropy are done a chunk of rows at a time, in the arithmetic of
the forward pass (bf16 products under autocast, fp32 sums), and rows without a label are left out altogether.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.training.objective import Batch

IGNORED = -100
CHUNK = 2**20  # logits held at once: 4 MB in fp32, so that the passes over them stay in cache


def rows_per_chunk(vocab_size: int) -> int:
    """Rows of logits held at once."""
    return max(32, CHUNK // vocab_size)


class _WeightedNLL(torch.autograd.Function):
    """Σᵢ wᵢ · −log softmax(hᵢ Wᵀ)[yᵢ]. The gradients are made on the way forward, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        size = rows_per_chunk(weight.shape[0])
        w = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32 if dtype != torch.float64 else dtype, device=hidden.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if wants_weight else None
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            h = hidden[rows].to(dtype)  # (n, D)
            logits = (h @ w.T).to(total.dtype)  # (n, V)
            target = labels[rows, None]
            largest = logits.amax(dim=-1, keepdim=True)  # (n, 1)
            picked = logits.gather(1, target) - largest
            exponentials = logits.sub_(largest).exp_()  # in place: the logits are not needed again
            normaliser = exponentials.sum(dim=-1, keepdim=True)
            scale = weights[rows, None]
            total += (scale * (normaliser.log() - picked)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            gradient = exponentials.mul_(scale / normaliser)  # of the logits: w · (softmax − one-hot)
            gradient.scatter_add_(1, target, -scale)
            gradient = gradient.to(dtype)
            if grad_hidden is not None:
                torch.mm(gradient, w, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += gradient.T @ h
        ctx.gradients = (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.gradients
        scaled = [None if g is None else g * upstream.to(g.dtype) for g in (grad_hidden, grad_weight)]
        return (*scaled, None, None, None)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hᵢ Wᵀ)[yᵢ] a row. The gradient of a row is known only later: its logits are made a second time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.dtype = dtype
        w, size = weight.to(dtype), rows_per_chunk(weight.shape[0])
        exact = torch.float32 if dtype != torch.float64 else dtype
        found = []
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            logits = (hidden[rows].to(dtype) @ w.T).to(exact)
            found.append(logits.gather(1, labels[rows, None]).squeeze(1) - torch.logsumexp(logits, dim=-1))
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=exact)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels = ctx.saved_tensors
        with torch.enable_grad():
            h = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
            w = weight.detach().requires_grad_(ctx.needs_input_grad[1])
            _WeightedNLL.apply(h, w, labels, -upstream, ctx.dtype).backward()
        return h.grad, w.grad, None, None


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The format in which products are taken: autocast's where it is on, else the tensor's own."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def weighted_nll(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ w · −log p(label) in nats, a scalar.

    hidden (…, D), weight (V, D) of the output layer, labels (…) with −100 where there is none, weights (…) or 1.
    """
    kept = labels != IGNORED
    rows, targets = hidden[kept], labels[kept]
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scale = torch.ones_like(targets, dtype=exact) if weights is None else weights[kept].to(exact)
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        result: Tensor = _WeightedNLL.apply(rows, weight, targets, scale, dtype)
    return result


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """log p(label) in nats for every position, 0 where there is no label: (…), from hidden (…, D) and weight (V, D)."""
    kept = labels != IGNORED
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        found: Tensor = _TokenLogProbs.apply(hidden[kept], weight, labels[kept], dtype)
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


def output_weight(model: Any) -> Tensor:
    """The output layer's weight (V, D). Raises FledgeError for heads that do more than one product."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    extras = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    if type(head) is not nn.Linear or head.bias is not None or any(getattr(config, name, None) for name in extras):
        raise FledgeError(Problem(t("the output layer of this model is more than a matrix"), found=type(head).__name__))
    return head.weight
