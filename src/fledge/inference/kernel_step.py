"""A step whose attention and rotation are compiled loops (`kernels.py`) over the blocks where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fledge.inference import kernels
from fledge.inference.paged import BLOCK, KeyValues, Step
from fledge.inference.step import Part

_PIECE = 16
"""tokens of a prompt that are one piece of work, so that threads end at about the same time"""


class KernelStep(Step):
    """See `Step`. Each new token is computed by itself, over its own keys in their order."""

    def __init__(self, parts: Sequence[Part], kv: KeyValues, filler: int = 0) -> None:
        super().__init__(parts, kv, filler)
        pieces, first = [], 0
        for row, part in enumerate(parts):
            for begin in range(0, len(part.ids), _PIECE):
                pieces.append((first + begin, min(_PIECE, len(part.ids) - begin), part.start + begin, row))
            first += len(part.ids)
        self._width = max(-(-part.end // BLOCK) for part in parts)
        table = [[block + 1 for block in part.blocks[: self._width]] for part in parts]
        table = [blocks + [0] * (self._width - len(blocks)) for blocks in table]
        self._table, self._pieces = torch.tensor(table), torch.tensor(pieces)
        self._seen = sum(len(part.ids) * part.end for part in parts)  # keys that are looked at, or a few more
        self._scratch: dict[int, Tensor] = {}

    def rotate_and_keep(self, layer: int, mixed: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """Query (T, H, D) with its positions, of mixed (T, (H + 2 KV) · D); key and value go to their blocks."""
        pool = self.kv.layers[layer]
        kv_heads, dim = pool.shape[1], pool.shape[-1]
        query = mixed.new_empty(len(mixed), heads, dim)
        kernels.rotate_and_keep(mixed.dtype, dim, BLOCK)(
            2 * mixed.numel(), kernels.of(mixed), kernels.of(cos), kernels.of(sin), kernels.of(query),
            kernels.of(pool), kernels.of(self.slots), len(self.slots), len(mixed), self.kv.blocks, heads, kv_heads,
        )  # fmt: skip
        return query

    def attend_kept(
        self, layer: int, query: Tensor, scale: float, window: int | None, softcap: float | None, slopes: Tensor | None
    ) -> Tensor:
        query, pool = query.contiguous(), self.kv.layers[layer]
        (length, heads, dim), kv_heads = query.shape, pool.shape[1]
        shared = heads // kv_heads
        keys = self._width * BLOCK
        room = shared * (keys + 2 * dim) + 32
        if room not in self._scratch:
            self._scratch[room] = torch.empty(torch.get_num_threads() * room)
        slopes = None if slopes is None else slopes.float().contiguous()
        out = torch.empty_like(query)
        if len(self.slots) < length:
            out[len(self.slots) :] = 0
        kernels.attention(query.dtype, dim, shared, BLOCK)(
            2 * self._seen * heads * dim, kernels.of(query), kernels.of(pool), kernels.of(out),
            kernels.of(self._pieces), kernels.of(self._table), len(self._pieces), heads, kv_heads, self.kv.blocks,
            self._width, kernels.bits(scale), kernels.of(self._scratch[room]), room, keys, window or 0,
            0 if slopes is None else kernels.of(slopes), kernels.bits(softcap or 0),
        )  # fmt: skip
        return out.flatten(1)
