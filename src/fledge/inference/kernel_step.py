"""A step whose attention and rotation are compiled loops (`loops.py`) over the blocks where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fledge.inference import program
from fledge.inference.kernels import bits, of
from fledge.inference.loops import Op
from fledge.inference.paged import BLOCK, KeyValues, Step
from fledge.inference.step import Part
from fledge.inference.tiles import together

_PIECE = 16
"""tokens of a prompt that are one piece of work, so that threads end at about the same time"""


class KernelStep(Step):
    """See `Step`. Each new token is computed by itself, over its own keys in their order.

    In its blocks keys lie as the loops read them: (head_dim / n, BLOCK, n), n numbers in four bytes.
    """

    def __init__(self, parts: Sequence[Part], kv: KeyValues, filler: int = 0) -> None:
        super().__init__(parts, kv, filler)
        pieces, first = [], 0
        for row, part in enumerate(parts):
            for begin in range(0, len(part.ids), _PIECE):
                pieces.append((first + begin, min(_PIECE, len(part.ids) - begin), part.start + begin, row))
            first += len(part.ids)
        width = max(-(-part.end // BLOCK) for part in parts)
        table = [[block + 1 for block in part.blocks[:width]] for part in parts]
        self.table = torch.tensor([blocks + [0] * (width - len(blocks)) for blocks in table])
        self.pieces = torch.tensor(pieces)
        self.keys = width * BLOCK
        self.seen = sum(len(part.ids) * part.end for part in parts)
        """keys that are looked at, or a few more"""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        pool = self.kv.layers[layer]
        n, (heads, blocks, dim) = together(pool.dtype), (pool.shape[1], pool.shape[2], pool.shape[-1])
        block, place = self.slots // BLOCK, self.slots % BLOCK
        turned = keys[0].transpose(0, 1).reshape(-1, heads, dim // n, n)
        pool[0].view(heads, blocks, dim // n, BLOCK, n)[:, block, :, place] = turned
        pool[1, :, block, place] = values[0]

    def rotate_and_keep(self, layer: int, mixed: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """Query (T, H, D) with its positions, of mixed (T, (H + 2 KV) · D); key and value go to their blocks."""
        pool = self.kv.layers[layer]
        kv_heads, dim = pool.shape[1], pool.shape[-1]
        query = mixed.new_empty(len(mixed), heads, dim)
        program.run(
            mixed.dtype, 2 * mixed.numel(), Op.ROTATE, of(mixed), of(cos), of(sin), of(query), of(pool),
            of(self.slots), len(self.slots), len(mixed), self.kv.blocks, heads, kv_heads, 0, 0, 0, dim,
        )  # fmt: skip
        return query

    def attend_kept(
        self, layer: int, query: Tensor, scale: float, window: int | None, softcap: float | None, slopes: Tensor | None
    ) -> Tensor:
        query, pool = query.contiguous(), self.kv.layers[layer]
        (length, heads, dim), kv_heads = query.shape, pool.shape[1]
        slopes = None if slopes is None else slopes.float().contiguous()
        out = torch.empty_like(query)
        if len(self.slots) < length:
            out[len(self.slots) :] = 0
        program.run(
            query.dtype, 2 * self.seen * heads * dim, Op.ATTEND, of(query), of(pool), of(out), of(self.pieces),
            of(self.table), len(self.pieces), heads, kv_heads, self.kv.blocks, self.table.shape[1], bits(scale),
            window or 0, 0 if slopes is None else of(slopes), bits(softcap or 0), dim,
            room=program.attention_room(dim, self.keys),
        )  # fmt: skip
        return out.flatten(1)
