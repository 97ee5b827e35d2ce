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
from torch.distributed.tensor import DTensor

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.models.states import decoder_of as decoder_of
from fledge.models.states import packed_mask as packed_mask
from fledge.models.states import packed_states, padded_states
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
        shape = (len(hidden), len(weight))
        out = torch.empty(shape, dtype=exact, device=hidden.device)
        products = out if exact == hidden.dtype else torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        return self.logits_into(out, products, hidden, weight, bias)

    def logits_into(self, out: Tensor, products: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same, written into `out` (n, V); `products` (n, V) holds them before they are widened."""
        if bias is None:
            torch.mm(hidden, weight.T, out=products)
        else:
            torch.addmm(bias, hidden, weight.T, out=products)
        logits = out if out.dtype == products.dtype else out.copy_(products)
        if self.scale != 1:
            logits = logits.mul_(self.scale)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits

    def without_cap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of h Wᵀ + b from that of the logits, in place."""
        if self.softcap:  # d/dx c·tanh(x/c) = 1 − (logits/c)²
            gradient.mul_(logits.div(self.softcap).square_().neg_().add_(1))
        return gradient.mul_(self.scale) if self.scale != 1 else gradient


class _Buffers:
    """What the chunks of one call write into, one after another: fresh memory for each would cost more than the sums.

    `products` and `logits` are one and the same where the products are exact.
    """

    def __init__(self, rows: int, weight: Tensor, dtype: torch.dtype, exact: torch.dtype) -> None:
        self._like, self._dtype, self._exact = weight, dtype, exact
        self._logits = torch.empty(rows, len(weight), dtype=exact, device=weight.device)
        self._products = self._logits if dtype == exact else torch.empty_like(self._logits, dtype=dtype)
        self._weight: tuple[Tensor, Tensor] | None = None

    def logits(self, rows: int) -> Tensor:
        """(rows, V) in the exact format."""
        return self._logits[:rows]

    def products(self, rows: int) -> Tensor:
        """(rows, V) in the format of the products."""
        return self.logits(rows) if self._products is self._logits else self._products[:rows]

    def rounded(self, values: Tensor) -> Tensor:
        """`values` (n, V) in the format of the products."""
        return values if values.dtype == self._dtype else self._products[: len(values)].copy_(values)

    def weight(self) -> Tensor:
        """(V, D) for one chunk's share of the weight's gradient."""
        if self._weight is None:
            narrow = torch.empty_like(self._like, dtype=self._dtype, memory_format=torch.contiguous_format)
            self._weight = narrow, narrow if self._dtype == self._exact else torch.empty_like(narrow, dtype=self._exact)
        return self._weight[0]

    def widened(self, share: Tensor) -> Tensor:
        """The share in the exact format; adding numbers of two formats is slow on CPUs."""
        assert self._weight is not None
        return share if share.dtype == self._exact else self._weight[1].copy_(share)


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
        size = min(rows_per_chunk(*weight.shape), max(1, len(labels)))
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        exact = torch.float32 if dtype != torch.float64 else dtype
        buffers = _Buffers(size, weight, dtype, exact)
        nll, squares = torch.zeros((), dtype=exact, device=hidden.device), torch.zeros((), dtype=exact)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            h = hidden[rows].to(dtype)  # (n, D)
            target, scale = labels[rows, None], weights[rows, None]
            logits = head.logits_into(buffers.logits(len(h)), buffers.products(len(h)), h, w, b)  # (n, V)
            capped = logits.clone() if head.softcap else logits
            largest = logits.amax(dim=-1, keepdim=True)  # (n, 1)
            picked = logits.gather(1, target) - largest
            probabilities = torch.softmax(logits, dim=-1, out=logits)  # in place: the logits are not needed again
            log_normaliser = probabilities.amax(dim=-1, keepdim=True).log_().neg_()  # the largest of them is 1 / Σ exp
            nll += (scale * (log_normaliser - picked)).sum()
            probability_scale = scale
            if z_loss:
                log_z = log_normaliser + largest
                squares = squares + (scale * log_z.square()).sum()
                probability_scale = scale * (1 + 2 * z_loss * log_z)
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            gradient = probabilities.mul_(probability_scale)  # of the logits: w · (softmax − one-hot)
            gradient.scatter_add_(1, target, -scale)
            gradient = head.without_cap(gradient, capped)
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0)
            rounded = buffers.rounded(gradient)
            if grad_hidden is not None:
                torch.mm(rounded, w, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += buffers.widened(torch.mm(rounded.T, h, out=buffers.weight()))
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
        if isinstance(head.weight, DTensor):
            from fledge.training.layout.vocabulary import nll_of_parts

            return nll_of_parts(rows, head, targets, scale, z_loss, dtype)
        result: tuple[Tensor, Tensor] = _WeightedNLL.apply(
            rows, head.weight, head.bias, targets, scale, head, z_loss, dtype
        )
    return result


def token_logprobs(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """log p(label) in nats for every position, 0 where there is no label: (…), from hidden (…, D)."""
    kept = labels != IGNORED
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if isinstance(head.weight, DTensor):
            from fledge.training.layout.vocabulary import logprobs_of_parts

            found = logprobs_of_parts(hidden[kept], head, labels[kept], dtype)
        else:
            found = _TokenLogProbs.apply(hidden[kept], head.weight, head.bias, labels[kept], head, dtype)
    return torch.zeros(labels.shape, dtype=found.dtype, device=found.device).masked_scatter(kept, found)


def shifted(labels: Tensor) -> Tensor:
    """Labels for the position before them: (B, T) → (B, T), nothing to predict at the end of a row."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def targets_of(batch: Batch) -> Tensor:
    """What each position is to predict, −100 where nothing: (B, T). Parts of rows have it said already."""
    return batch["targets"] if "targets" in batch else shifted(batch["labels"])


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """The last hidden states (B, T, D) for rows padded on the right, or packed.

    Padded rows come with an `attention_mask`, and need none under causal attention: no token looks at what follows
    it. Packed rows come without, and say where documents begin by `position_ids` that restart at 0; documents do not
    see each other, on any kernel (`models.states`).
    """
    if "starts" in batch:
        from fledge.training.layout.context import part_states

        return part_states(model, batch)
    body = decoder_of(model)
    if "attention_mask" not in batch and "position_ids" in batch:
        return packed_states(body, batch["input_ids"], batch["position_ids"])
    return padded_states(body, batch["input_ids"], batch.get("attention_mask"))


def head_of(model: Any) -> Head:
    """The output layer as its numbers. Raises FledgeError for one that is not a linear layer."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise FledgeError(Problem(t("the output layer of this model is not linear"), found=type(layer).__name__))
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    return Head(layer.weight, layer.bias, scale, float(getattr(config, "final_logit_softcapping", None) or 0))
