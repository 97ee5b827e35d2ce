"""Weights in 4 bits, and the loop that multiplies them.

A row of weights is a row in 8 bits (a scale for each output) that is kept in 4: 32 neighbours share an offset z and a
step s of eighths, and a weight q in 0 … 15 stands for the whole number z + (q · s + 4) div 8. So whoever multiplies
has whole numbers in 8 bits before him, as in int8, and sums of whole numbers are exact in any order. (Two levels of
scales, W4A8: Lin et al., QServe, 2024; the eighths are ours, since whole steps cost narrow groups half their levels.)

The compiled product (`loops.py`) unpacks 64 outputs at a time and multiplies all rows with them. Without it PyTorch
unpacks the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.inference import kernels, tiles

GROUP = 32
"""neighbouring inputs that share an offset and a step"""
_FITS = 2


@dataclass(frozen=True)
class Int4:
    """A matrix (out, in) of whole numbers -127 … 127 in 4 bits: 4.5 of them a weight, with offset and step.

    It lies as tiles read it, in blocks of 64 outputs filled up with zeros.
    """

    outputs: int
    pairs: Tensor
    """(out / 64, in / 32, 4, 64, 4) uint8: of a group's eight fours of inputs, n in the lower and n + 4 in the upper
    halves of the bytes"""
    steps: Tensor
    """(out / 64, in / 32, 64) uint8, in eighths"""
    offsets: Tensor
    """(out / 64, in / 32, 64) int8"""
    shifts: Tensor
    """(out,) int32, in blocks too: 128 · the sum of an output's weights, since rows are moved by 128"""

    @classmethod
    def nearest(cls, rows: Tensor) -> Int4:
        """A near one to `rows` (out, in), floats of -127 … 127; `in` is a multiple of 32.

        First each group's lowest and highest weight are kept; then, by turns, the line through what the weights became
        (least squares) and the nearest weights on that line, as long as they come nearer.
        """
        blocks = -(-len(rows) // tiles.COLUMNS)
        groups = F.pad(rows, (0, 0, 0, blocks * tiles.COLUMNS - len(rows))).unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        best = _rounded(groups, low, (high - low) / 15)
        for _ in range(_FITS):
            mean = best[0].mean(-1, keepdim=True)
            spread = best[0] - mean
            slope = (spread * groups).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True).clamp(min=1e-6)
            found = _rounded(groups, groups.mean(-1, keepdim=True) - slope * mean, slope)
            better = _error(groups, *found) < _error(groups, *best)
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        q = best[0].to(torch.uint8).view(blocks, tiles.COLUMNS, -1, 2, 4, 4)  # block, output, group, half, four, input
        pairs = (q[:, :, :, 0] | q[:, :, :, 1] << 4).permute(0, 2, 3, 1, 4).contiguous()
        steps, offsets = (each.view(blocks, tiles.COLUMNS, -1).transpose(1, 2).contiguous() for each in best[1:])
        shifts = 128 * _values(*best).sum((1, 2))
        return cls(
            len(rows), pairs, steps.to(torch.uint8), offsets.to(torch.int8), shifts.to(torch.int32),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(each.nbytes for each in (self.pairs, self.steps, self.offsets, self.shifts))

    def unpacked(self) -> Tensor:
        """The whole numbers (out, in), int8."""
        # block, group, half, four, output, input
        q = torch.stack((self.pairs & 15, self.pairs >> 4), 2).to(torch.int16)
        values = (q * self.steps[:, :, None, None, :, None] + 4 >> 3) + self.offsets[:, :, None, None, :, None]
        return values.to(torch.int8).permute(0, 4, 1, 2, 3, 5).flatten(2).flatten(0, 1)[: self.outputs]


def _rounded(groups: Tensor, offsets: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
    """The weights 0 … 15 that come nearest to groups (…, 32), the steps in eighths, the offsets; all whole numbers."""
    offsets = offsets.round().clamp(-127, 127)
    most = ((8 * (128 - offsets) - 5) / 15).floor()  # beyond it the 15th step is no number of 8 bits any more
    steps = (steps * 8).round().clamp(min=1).minimum(most)
    return ((groups - offsets) * 8 / steps.clamp(min=1)).round().clamp(0, 15), steps, offsets


def _values(q: Tensor, steps: Tensor, offsets: Tensor) -> Tensor:
    return ((q * steps + 4) / 8).floor() + offsets


def _error(groups: Tensor, q: Tensor, steps: Tensor, offsets: Tensor) -> Tensor:
    return (_values(q, steps, offsets) - groups).square().sum(-1, keepdim=True)


if tiles.ir is not None and kernels.numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    _BYTES, _SHORTS = ir.VectorType(ir.IntType(8), 16), ir.VectorType(ir.IntType(16), 32)
    _WORDS, _I64 = ir.VectorType(ir.IntType(32), 16), ir.IntType(64)

    @intrinsic  # type: ignore[misc]
    def unpack(typing: Any, pairs: Any, steps: Any, offsets: Any, out: Any, groups: Any) -> Any:
        """Some groups of 64 outputs as whole numbers, in the order of `tiles.pack`; addresses, and how many groups."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            pairs, steps, offsets, out, groups = given

            def at(address: Any, each: int, index: Any, rest: int, kind: Any) -> Any:
                place = builder.add(builder.mul(index, _I64(each)), _I64(rest))
                return builder.inttoptr(builder.add(address, place), kind.as_pointer())

            def all_of(value: int) -> Any:
                return ir.Constant(_SHORTS, [value] * 32)

            def twice(words: Any) -> Any:
                """Sixteen numbers of 16 bits, each in both halves of 32."""
                low = builder.and_(words, ir.Constant(_WORDS, [0xFFFF] * 16))
                return builder.bitcast(builder.or_(low, builder.shl(words, ir.Constant(_WORDS, [16] * 16))), _SHORTS)

            with cgutils.for_range(builder, groups) as loop:
                for part in range(4):  # sixteen outputs
                    step, first = (
                        builder.load(at(each, 64, loop.index, 16 * part, _BYTES), align=1) for each in (steps, offsets)
                    )
                    step, first = twice(builder.zext(step, _WORDS)), builder.sext(first, _WORDS)
                    first = builder.shl(first, ir.Constant(_WORDS, [3] * 16))
                    first = twice(builder.add(first, ir.Constant(_WORDS, [4] * 16)))
                    for four in range(4):
                        both = builder.load(at(pairs, 1024, loop.index, 256 * four + 64 * part, _SHORTS), align=1)
                        for half in range(2):
                            values = []
                            for shift in (4 * half, 4 * half + 8):  # the even bytes' q, the odd ones'
                                q = builder.and_(builder.lshr(both, all_of(shift)), all_of(15))
                                values.append(builder.ashr(builder.add(builder.mul(q, step), first), all_of(3)))
                            found = builder.or_(builder.and_(values[0], all_of(255)), builder.shl(values[1], all_of(8)))
                            target = at(out, 2048, loop.index, 256 * (four + 4 * half) + 64 * part, _SHORTS)
                            builder.store(found, target, align=1)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), code
