"""Causal attention for training on CPUs: a few large matrix products a layer, and none between documents.

What `F.scaled_dot_product_attention` does on a CPU is a loop of small products that reaches a fifth of the
processor's rate. Here the rows are cut into segments that do not see each other (a row, or a document of a packed
row), and a segment into blocks of queries; the scores of one block are one batched product, their softmax one pass,
and so on. A block sees no key behind its last query, so that half of the square is never computed, and nothing is
spent on pairs from different documents. Only one block's probabilities are in memory: the backward pass makes them
again from the queries and keys.

Scores and probabilities are held in the format of the products (as in the eager attention of transformers), sums are
taken in fp32 inside each product, and the gradients of keys and values are added up in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "fledge_blocks"
BLOCK = 256  # queries: enough for full speed, few enough to skip most of what is hidden
MULTIPLE = 32  # tokens: sizes of products are rounded up to it


def document_starts(position_ids: Tensor) -> Tensor:
    """Where each token's document begins in its row: (B, T) positions that restart at 0 → (B, T) int32."""
    places = torch.arange(position_ids.shape[1], dtype=torch.int32, device=position_ids.device).expand_as(position_ids)
    begins = torch.where(position_ids == 0, places, torch.zeros_like(places))
    return begins.cummax(dim=-1).values


def segments(starts: Tensor | None, rows: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, end, first token, end) of what attends to itself alone; without documents all rows are one."""
    if starts is None:
        yield 0, rows, 0, length
        return
    for row, begins in enumerate(starts.numpy()):
        firsts = np.flatnonzero(begins == np.arange(length)).tolist()
        for first, end in zip(firsts, [*firsts[1:], length], strict=True):
            yield row, row + 1, first, end


def _blocks(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(first query, end, first key) of the blocks of a segment, the last one first: it sees the most keys."""
    for start in reversed(range(0, length, BLOCK)):
        yield start, min(start + BLOCK, length), max(0, (start - window + 1) // MULTIPLE * MULTIPLE) if window else 0


@lru_cache(maxsize=64)
def _bias(queries: int, keys: int, window: int, dtype: torch.dtype) -> Tensor:
    """(queries, 1, keys): 0 where the key may be seen, −∞ elsewhere. The last query stands at the last key."""
    query, key = torch.arange(keys - queries, keys)[:, None, None], torch.arange(keys)
    seen = (key <= query) & (key > query - window) if window else key <= query
    return torch.zeros(queries, 1, keys, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _probabilities(query: Tensor, key: Tensor, groups: int, window: int, scale: float) -> Tensor:
    """softmax of one block's scores: query (N, count · G, D), key (N, keys, D) → (N, count · G, keys)."""
    n, rows, keys = len(query), query.shape[1], key.shape[1]
    scores = torch.empty(n, rows, keys, dtype=query.dtype)
    torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scale, out=scores)
    count = rows // groups
    hidden = keys if window else count  # without a window only the last square has anything to hide
    scores.view(n, count, groups, keys)[..., -hidden:].add_(_bias(count, hidden, window, query.dtype))
    return torch.softmax(scores, dim=-1, out=scores)


@torch.library.custom_op("fledge::block_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, scale: float) -> Tensor:
    """query (B, K, T, G, D), key and value (B, K, T, D), contiguous → (B, K, T, G, D).

    The G queries that share a key stand side by side, so that a block of queries is a matrix as it lies in memory.
    """
    rows, kv_heads, length, groups, width = query.shape
    out = torch.empty_like(query)
    whole = [x.view(rows * kv_heads, -1, width) for x in (query, key, value)]
    o = out.view(rows * kv_heads, -1, width)
    for row, last, first, end in segments(starts, rows, length):
        n = slice(row * kv_heads, last * kv_heads)
        q, k, v = (_segment(x, n, first, end, size) for x, size in zip(whole, (groups, 1, 1), strict=True))
        for q0, q1, k0 in _blocks(k.shape[1], window):
            p = _probabilities(q[:, q0 * groups : q1 * groups], k[:, k0:q1], groups, window, scale)
            kept = min(q1, end - first)
            found = torch.bmm(p, v[:, k0:q1])[:, : (kept - q0) * groups]
            o[n, (first + q0) * groups : (first + kept) * groups] = found
    return out


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, scale: float) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("fledge::block_attention_backward", mutates_args=())
def _backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value from that of the output."""
    rows, kv_heads, length, groups, width = query.shape
    made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    whole = [x.view(rows * kv_heads, -1, width) for x in (query, upstream, key, value)]
    by_q, by_k, by_v = (x.view(rows * kv_heads, -1, width) for x in made)
    exact = torch.promote_types(query.dtype, torch.float32)
    for row, last, first, end in segments(starts, rows, length):
        n = slice(row * kv_heads, last * kv_heads)
        q, g, k, v = (_segment(x, n, first, end, size) for x, size in zip(whole, (groups, groups, 1, 1), strict=True))
        sums: list[Tensor] = []
        for q0, q1, k0 in _blocks(k.shape[1], window):
            queries, keys = slice(q0 * groups, q1 * groups), slice(k0, q1)
            p = _probabilities(q[:, queries], k[:, keys], groups, window, scale)
            by_p = torch.bmm(g[:, queries], v[:, keys].transpose(1, 2))
            by_score = torch._softmax_backward_data(by_p, p, -1, p.dtype)
            kept = min(q1, end - first)
            found = _product(by_score, k[:, keys], scale)[:, : (kept - q0) * groups]
            by_q[n, (first + q0) * groups : (first + kept) * groups] = found
            parts = [_product(by_score.transpose(1, 2), q[:, queries], scale),
                     torch.bmm(p.transpose(1, 2), g[:, queries])]  # fmt: skip
            if not sums and k.shape[1] == q1 - k0:  # one block sees all keys
                sums = parts
                continue
            # adding numbers of two formats is slow on CPUs: widened first
            sums = sums or [torch.zeros(k.shape, dtype=exact) for _ in parts]
            sums = [x if x.dtype == exact else x.to(exact) for x in sums]
            for total, part in zip(sums, parts, strict=True):
                total[:, keys] += part.to(exact)
        by_k[n, first:end], by_v[n, first:end] = (total[:, : end - first] for total in sums)
    return made


def _segment(values: Tensor, rows: slice, first: int, end: int, size: int) -> Tensor:
    """Some tokens of some rows, `size` vectors each, of (N, T · size, D); zeros behind them up to a multiple of
    `MULTIPLE` tokens.

    Every size of a product is prepared once and remembered: documents of a thousand lengths would fill the memory.
    What is added stands behind all real queries, which do not look ahead, and has no gradient.
    """
    found, missing = values[rows, first * size : end * size], -(end - first) % MULTIPLE
    return F.pad(found, (0, 0, 0, missing * size)) if missing else found


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left @ right of batches of matrices, in one pass."""
    out = torch.empty(len(left), left.shape[1], right.shape[2], dtype=left.dtype)
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


@_backward.register_fake
def _(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(upstream.contiguous(), *ctx.saved_tensors, ctx.window, ctx.scale), None, None, None)


_forward.register_autograd(_gradients, setup_context=_keep)


def attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None = None, window: int = 0, scale: float | None = None
) -> Tensor:
    """Causal attention: query (B, H, T, D), key and value (B, K, T, D) with H a multiple of K → (B, T, H, D).

    `starts` (B, T) int32 says where each token's document begins in its row; `window` how many keys back a query
    sees, itself included (0: all).
    """
    rows, heads, length, width = query.shape
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    grouped = query.reshape(rows, key.shape[1], -1, length, width).transpose(2, 3).contiguous()
    scale = width**-0.5 if scale is None else scale
    found: Tensor = _forward(grouped, key.contiguous(), value.contiguous(), starts, window, scale)  # (B, K, T, G, D)
    return found.transpose(1, 2).reshape(rows, length, heads, width)


def _for_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls; `attention_mask` is None or `document_starts` as (B, 1, T, 1)."""
    starts = None if attention_mask is None else attention_mask[:, 0, :, 0]
    window = sliding_window or 0
    if dropout or query.shape[2] != key.shape[2]:  # rare: dropout of probabilities, and a cache
        everything = torch.zeros(len(query), query.shape[2], dtype=torch.int32)
        mask = visible(everything if starts is None else starts, window) if starts is not None or window else None
        rest |= {"is_causal": mask is None}
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **rest)
    return attention(query, key, value, starts, window, scaling), None


def visible(starts: Tensor, window: int = 0) -> Tensor:
    """(B, 1, T, T): which key each query may see, where documents begin at `starts` (B, T)."""
    place = torch.arange(starts.shape[1], device=starts.device)
    seen = (place[None, :] <= place[:, None]) & (place[None, None, :] >= starts[:, :, None])
    return (seen & (place[None, :] > place[:, None] - window) if window else seen)[:, None]


AttentionInterface.register(NAME, _for_transformers)
AttentionMaskInterface.register(NAME, lambda *args, **rest: None)
