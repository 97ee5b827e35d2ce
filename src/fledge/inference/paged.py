"""Attention over a pool of blocks: what every layer of a model reads and writes in a step of the engine.

A layer's keys and values lie in one tensor (2, kv_heads, blocks, block_tokens, head_dim); a sequence's are scattered
over blocks that its table names (Kwon et al., PagedAttention, 2023). A step brings tokens of many sequences end to end;
sequences with as many new tokens and as many chunks of keys are computed together as a `Group`.

The bits of a token's result do not depend on what else is in the step, nor on how its prompt was cut: keys are reduced
in chunks of fixed size (`CHUNK`, a masked one adds exact zeros), chunks are added in order, and no matrix product has
fewer than `ROWS` rows, below which BLAS libraries change their order of summation. In fp32 on CPUs this was seen to
hold for 4 to 2,048 rows; `tests/inference/test_paged.py` keeps seeing it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.step import Part

NAME = "fledge_paged"
BLOCK = 16
"""tokens in a block: the last block of a sequence is half empty on average, 4 % of 200 tokens"""
CHUNK = 128
"""keys that are reduced together"""
ROWS = 4
"""the fewest rows of a matrix product"""
_GATHERED = 64 << 20
"""bytes of keys and values that a group brings together at once"""


class KeyValues:
    """The blocks of every layer. `layers[i]` is (2, kv_heads, blocks, BLOCK, head_dim)."""

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        """`shapes`: (kv_heads, head_dim) of each layer."""
        self.shapes, self.dtype, self.device = list(shapes), dtype, device
        self.blocks = 0
        self.layers: list[Tensor] = []
        self._gathered = torch.empty(0, dtype=dtype, device=device)

    @property
    def bytes_per_block(self) -> int:
        """Of all layers, keys and values."""
        return sum(2 * heads * BLOCK * dim for heads, dim in self.shapes) * self.dtype.itemsize

    def allocate(self, blocks: int) -> None:
        """Have at least `blocks` blocks, keeping what is in them. One more is made: row 0, which stays zero."""
        blocks += 1
        if blocks <= self.blocks:
            return
        for place, (heads, dim) in enumerate(self.shapes):
            # Zeros, not what was in memory: a masked NaN would still poison the sum (0 · NaN = NaN).
            new = _zeros((2, heads, blocks, BLOCK, dim), self.dtype, self.device)
            if self.blocks:
                new[:, :, : self.blocks] = self.layers[place]
                self.layers[place] = new
            else:
                self.layers.append(new)
        self.blocks = blocks

    def copy(self, source: int, target: int) -> None:
        """Make block `target` like block `source`."""
        for layer in self.layers:
            layer[:, :, target + 1] = layer[:, :, source + 1]

    def clear(self, blocks: Sequence[int]) -> None:
        """Make blocks zero: who fills one of them in part would meet what is behind."""
        for layer in self.layers:
            layer[:, :, [block + 1 for block in blocks]] = 0

    def gather(self, layer: int, group: Group) -> Tensor:
        """The keys and values of a group's blocks: (2, kv_heads, sequences, keys, head_dim)."""
        pool = self.layers[layer]
        heads, dim = pool.shape[1], pool.shape[-1]
        rows = pool.view(2 * heads * self.blocks, BLOCK * dim)
        index = group.planes(2 * heads, self.blocks)
        wanted = index.numel() * BLOCK * dim
        if self._gathered.numel() < wanted:
            self._gathered = torch.empty(wanted, dtype=self.dtype, device=self.device)
        found = self._gathered[:wanted].view(index.numel(), BLOCK * dim)
        torch.index_select(rows, 0, index, out=found)
        return found.view(2, heads, group.count, -1, dim)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, at the beginning of a line of memory; on a processor they take no memory before they are written."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    wanted = math.prod(shape) * dtype.itemsize
    room = torch.from_numpy(np.zeros(wanted + 64, dtype=np.uint8))  # torch.zeros would write them
    start = -room.data_ptr() % 64
    return room[start : start + wanted].view(dtype).view(*shape)


@dataclass
class Group:
    """Sequences of a step with equally many new tokens and equally many chunks of keys.

    Their tokens lie end to end in the step, from `first` on.
    """

    first: int
    tokens: int
    """new tokens of each sequence"""
    positions: Tensor
    """(sequences, tokens): of the new tokens"""
    table: Tensor
    """(sequences, rows): where the pool has the blocks of their keys, filled up to whole chunks with row 0"""
    _planes: dict[int, Tensor] = field(default_factory=dict)
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many sequences."""
        return self.table.shape[0]

    @property
    def end(self) -> int:
        """Where the next group's tokens begin."""
        return self.first + self.count * self.tokens

    def planes(self, planes: int, blocks: int) -> Tensor:
        """The rows of a pool that is seen as (planes · blocks, …)."""
        if planes not in self._planes:
            start = torch.arange(planes, device=self.table.device)[:, None] * blocks
            self._planes[planes] = (start + self.table.flatten()).flatten()
        return self._planes[planes]

    @property
    def keys(self) -> Tensor:
        """The positions of the keys, by chunk: (chunks, CHUNK)."""
        return torch.arange(self.table.shape[1] * BLOCK, device=self.table.device).view(-1, CHUNK)

    def mask(self, window: int | None) -> Tensor:
        """What is added to the scores, 0 or -inf: (sequences, chunks, tokens, CHUNK), fp32."""
        if window not in self._masks:
            ago = self.positions[:, None, :, None] - self.keys[:, None, :]
            seen = (ago >= 0) if window is None else (ago >= 0) & (ago < window)
            self._masks[window] = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -math.inf)
        return self._masks[window]


class Step(ABC):
    """A step as the layers see it: where its tokens' keys go, and what they attend to."""

    def __init__(self, parts: Sequence[Part], kv: KeyValues, filler: int = 0) -> None:
        """`parts` in the order in which their tokens lie (`in_groups`); `filler` tokens after them are nobody's."""
        self.kv, self.device = kv, kv.device
        positions, slots = [], []
        for part in parts:
            places = range(part.start, part.end)
            positions += places
            slots += [(part.blocks[place // BLOCK] + 1) * BLOCK + place % BLOCK for place in places]
        self.positions = torch.tensor(positions + [0] * filler, device=self.device)[None]  # (1, T)
        self.slots = torch.tensor(slots, device=self.device)  # (tokens,): row · BLOCK + offset

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float,
        window: int | None = None, softcap: float | None = None, slopes: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Causal attention of query (1, H, T, D) to its sequences' keys, the new ones included; (1, T, H · D).

        `window`: keys seen at most; `slopes` (H,): ALiBi's, added to the scores by key position (Press et al., 2022).
        """
        self.write(layer, keys[:, :, : len(self.slots)], values[:, :, : len(self.slots)])
        return self.attend_kept(layer, query.transpose(1, 2)[0], scale, window, softcap, slopes)[None]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put the new keys and values (1, kv_heads, T, head_dim) into their slots."""
        pool = self.kv.layers[layer]
        flat = pool.view(2, pool.shape[1], -1, pool.shape[-1])
        flat[0].index_copy_(1, self.slots, keys[0])
        flat[1].index_copy_(1, self.slots, values[0])

    @abstractmethod
    def attend_kept(
        self, layer: int, query: Tensor, scale: float, window: int | None, softcap: float | None, slopes: Tensor | None
    ) -> Tensor:
        """The same for query (T, H, D) when keys and values are in their blocks already; (T, H · D)."""


class GroupedStep(Step):
    """Attention in PyTorch's operations: sequences of one kind are brought together and computed as a batch."""

    def __init__(self, parts: Sequence[Part], kv: KeyValues, filler: int = 0) -> None:
        super().__init__(parts, kv, filler)
        self.groups: list[Group] = []
        first = 0
        for tokens, chunks, members in _alike(parts, kv.bytes_per_block // max(len(kv.shapes), 1)):
            width = chunks * CHUNK // BLOCK
            table = [[block + 1 for block in part.blocks[: -(-part.end // BLOCK)]] for part in members]
            table = [rows + [0] * (width - len(rows)) for rows in table]
            place = self.positions[0, first : first + len(members) * tokens].view(-1, tokens)
            self.groups.append(Group(first, tokens, place, torch.tensor(table, device=self.device)))
            first = self.groups[-1].end

    def attend_kept(
        self, layer: int, query: Tensor, scale: float, window: int | None, softcap: float | None, slopes: Tensor | None
    ) -> Tensor:
        found = []
        for group in self.groups:
            kv = self.kv.gather(layer, group)  # (2, KV, B, L, D)
            rows = (query[group.first : group.end] * scale).transpose(0, 1)
            rows = rows.reshape(kv.shape[1], -1, group.count, group.tokens, query.shape[-1])
            alibi = _alibi(slopes, group, kv.shape[1])
            found.append(_attention(rows, kv[0], kv[1], group.mask(window), softcap, alibi))
        whole = torch.cat(found) if len(found) > 1 else found[0]
        if len(whole) < len(query):
            whole = torch.cat((whole, whole.new_zeros(len(query) - len(whole), *whole.shape[1:])))
        return whole.flatten(1)


def in_groups(parts: Sequence[Part]) -> list[int]:
    """The order in which the parts' tokens lie in a step: those that are computed together, next to each other."""
    return sorted(range(len(parts)), key=lambda n: (_kind(parts[n]), n))


def _kind(part: Part) -> tuple[int, int]:
    """(new tokens, chunks of keys)"""
    return len(part.ids), -(-part.end // CHUNK)


def _alike(parts: Sequence[Part], bytes_per_block: int) -> Iterator[tuple[int, int, list[Part]]]:
    """(new tokens, chunks, parts) of neighbours of one kind, as many as may be gathered at once."""
    start = 0
    while start < len(parts):
        tokens, chunks = kind = _kind(parts[start])
        most = max(1, _GATHERED // max(1, chunks * CHUNK // BLOCK * bytes_per_block))
        end = start + 1
        while end < len(parts) and end - start < most and _kind(parts[end]) == kind:
            end += 1
        yield tokens, chunks, list(parts[start:end])
        start = end


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softcap: float | None, alibi: Tensor | None
) -> Tensor:
    """(B · T, H, D) of query (KV, G, B, T, D), scaled already, keys and values (KV, B, L, D), mask (B, C, T, CHUNK)."""
    kv, shared, count, tokens, dim = query.shape
    chunks = keys.shape[2] // CHUNK
    rows = query.transpose(1, 2)  # (KV, B, G, T, D)
    spare = -(-ROWS // tokens) - shared
    if spare > 0:  # rows that nobody reads
        rows = F.pad(rows, (0, 0, 0, 0, 0, spare))
    lines = rows.shape[2] * tokens
    rows = rows.reshape(kv, count, 1, lines, dim).expand(kv, count, chunks, lines, dim)
    scores = torch.bmm(rows.reshape(-1, lines, dim), keys.reshape(-1, CHUNK, dim).transpose(1, 2)).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(kv, count, chunks, -1, tokens, CHUNK)
    if alibi is not None:
        scores = scores + F.pad(alibi, (0, 0, 0, 0, 0, max(spare, 0)))
    scores += mask[None, :, :, None]
    highest = scores.amax((2, 5), keepdim=True)
    weights = scores.sub_(highest).exp_()
    totals = weights.sum(-1, keepdim=True)  # (KV, B, C, G, T, 1)
    sums = torch.bmm(weights.to(values.dtype).view(-1, lines, CHUNK), values.reshape(-1, CHUNK, values.shape[-1]))
    sums = sums.float().view(kv, count, chunks, -1, tokens, values.shape[-1])
    total, found = totals[:, :, 0], sums[:, :, 0]
    for chunk in range(1, chunks):  # in order: a later chunk, all masked, adds zeros
        total, found = total + totals[:, :, chunk], found + sums[:, :, chunk]
    found = (found / total)[:, :, :shared].to(query.dtype)  # (KV, B, G, T, D)
    return found.permute(1, 3, 0, 2, 4).reshape(count * tokens, kv * shared, -1)


def _alibi(slopes: Tensor | None, group: Group, kv: int) -> Tensor | None:
    """(KV, 1, C, G, 1, CHUNK): each head's slope times the key's position."""
    if slopes is None:
        return None
    return slopes.float().view(kv, 1, 1, -1, 1, 1) * group.keys[None, None, :, None, None, :]


# ---- what transformers sees

_now: list[Any] = []
"""the step that is computed, or a `Probe`; nothing while whole texts are read"""


@contextmanager
def during(step: Any) -> Iterator[None]:
    """Let every attention of the models computed inside belong to `step`. The engine's worker alone computes."""
    _now.append(step)
    try:
        yield
    finally:
        _now.pop()


def current() -> Any:
    """The step that is computed, if any."""
    return _now[-1] if _now else None


class Probe:
    """Takes the place of a step for one token, and remembers what each layer keeps: (kv_heads, head_dim)."""

    def __init__(self, device: torch.device) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.positions = torch.arange(2, device=device)[None]

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, **more: Any) -> Tensor:
        if keys.shape != values.shape:
            raise FledgeError(t("the native engine needs keys and values of one size"))
        self.shapes[layer] = (keys.shape[1], keys.shape[3])
        return query.transpose(1, 2).reshape(1, query.shape[2], -1)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention that transformers calls: the step's while there is one, else PyTorch's."""
    step = current()
    if step is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    if s_aux is not None:
        raise FledgeError(Problem(t("the native engine does not know attention sinks"), found=type(module).__name__))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = step.attend(module.layer_idx, query, key, value, scale, window=sliding_window, softcap=softcap)
    return found.view(1, query.shape[2], query.shape[1], -1), None


def _mask(*args: Any, **more: Any) -> Tensor | None:
    return None if current() is not None else sdpa_mask(*args, **more)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _mask)
