"""The innermost loop of a matrix product, written in LLVM's own terms: some rows times 64 columns, in registers.

A tile keeps up to 6 × 64 sums in 24 of the processor's 32 wide registers and takes one step of the inner dimension at a
time, so that every sum is added in the order of that dimension whatever the number of rows: a row's bits do not depend
on the rows beside it. What it multiplies lies as it is read, 64 bytes after 64 bytes (`pack`). (Goto & van de Geijn,
Anatomy of High-Performance Matrix Multiplication, 2008.)

It is made for AVX-512: fused multiply-add in fp32, `vdpbf16ps` in bfloat16 (pairs of products, sums in fp32),
`vpdpbusd` in 8 bits (four products, sums in whole numbers). Without it fp32 is right, but too slow for large products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils, config
    from numba.extending import intrinsic

    from fledge.inference.kernels import loop
except ImportError:  # the wheels are not everywhere
    ir = None

ROWS, COLUMNS = 6, 64
"""of a tile: 24 registers of sums, four of what is multiplied"""
_LINE = 64
"""bytes of a register, and of a line of memory"""


@dataclass(frozen=True)
class Kind:
    """What is multiplied by what."""

    instruction: str
    together: int
    """numbers of the inner dimension that one instruction takes"""
    feature: str
    """the processor's, as LLVM names it"""
    whole: bool = False
    """whether the sums are whole numbers"""
    widened: bool = False
    """whether bfloat16 is made fp32 first, for left sides in fp32"""


FP32 = Kind("llvm.fma.v16f32", 1, "fma")
BF16 = Kind("llvm.x86.avx512bf16.dpbf16ps.512", 2, "avx512bf16")
INT8 = Kind("llvm.x86.avx512.vpdpbusd.512", 4, "avx512vnni", whole=True)
WIDENED = Kind("llvm.fma.v16f32", 1, "fma", widened=True)


@cache
def _features() -> frozenset[str]:
    """The processor's, or those that `NUMBA_CPU_FEATURES` names."""
    if ir is None:
        return frozenset()
    if config.CPU_FEATURES is not None:
        return frozenset(each[1:] for each in config.CPU_FEATURES.split(",") if each.startswith("+"))
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def has(feature: str) -> bool:
    """Whether this processor has a feature, as LLVM names it."""
    return feature in _features()


def together(dtype: torch.dtype) -> int:
    """Numbers of the inner dimension that lie next to each other: four bytes."""
    return 4 // dtype.itemsize


def pack(weights: Tensor) -> Tensor:
    """Weights (out, in) as tiles read them: (out / 64, in / n, 64, n), n numbers in four bytes, filled up with zeros.

    `in` is a multiple of n (rows of the left side are not copied to fill them up).
    """
    rows, width, n = *weights.shape, together(weights.dtype)
    blocks = -(-rows // COLUMNS)
    if blocks * COLUMNS > rows:
        weights = torch.cat((weights, weights.new_zeros(blocks * COLUMNS - rows, width)))
    return weights.view(blocks, COLUMNS, width // n, n).transpose(1, 2).contiguous()


if ir is not None:

    class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
        """LLVM's bfloat, which llvmlite cannot say."""

        null = "0.0"
        intrinsic_name = "bf16"

        def __str__(self) -> str:
            return "bfloat"

    _BFloat._create_instance()
    _I32, _I64 = ir.IntType(32), ir.IntType(64)
    _FLOATS, _WHOLES = ir.VectorType(ir.FloatType(), 16), ir.VectorType(_I32, 16)
    _HALVES, _PAIRS = ir.VectorType(ir.IntType(16), 16), ir.VectorType(_BFloat(), 32)

    def _tile(kind: Kind, rows: int, chunks: int, prefetch: bool = False) -> Any:
        """A loop over `steps`: out (rows, 16 · chunks) += x (rows, …) · w, with `fresh` instead of +=.

        Arguments, addresses and bytes: x, x's row; chunk addresses (four, the first `chunks` count) and their step;
        steps; out, out's row; fresh; next (64 bytes from there are fetched with each step, 256 apart).
        """
        sums, given = (_WHOLES, _I32) if kind.whole else (_FLOATS, ir.FloatType() if kind.together == 1 else _I32)
        operand = {BF16: _PAIRS, INT8: _WHOLES}.get(kind, _FLOATS)

        @intrinsic  # type: ignore[misc]
        def tile(
            typing: Any, x: Any, x_row: Any, w0: Any, w1: Any, w2: Any, w3: Any, w_step: Any, steps: Any, out: Any,
            out_row: Any, fresh: Any, following: Any,
        ) -> Any:  # fmt: skip
            def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                x, x_row, *ws, w_step, steps, out, out_row, fresh, following = arguments
                order = [sums, operand, operand] if kind.together > 1 else [operand, operand, sums]
                multiply = cgutils.get_or_insert_function(
                    builder.module, ir.FunctionType(sums, order), kind.instruction
                )

                def at(address: Any, offset: Any, type: Any) -> Any:
                    offset = _I64(offset) if isinstance(offset, int) else offset
                    return builder.inttoptr(builder.add(address, offset), type.as_pointer())

                def read(pointer: Any) -> Any:
                    value = builder.load(pointer)
                    value.align = 1
                    return value

                x_rows = [builder.add(x, builder.mul(x_row, _I64(row))) for row in range(rows)]
                out_rows = [builder.add(out, builder.mul(out_row, _I64(row))) for row in range(rows)]
                totals = [[cgutils.alloca_once(builder, sums) for _ in range(chunks)] for _ in range(rows)]
                for row in range(rows):
                    for chunk in range(chunks):
                        builder.store(ir.Constant(sums, None), totals[row][chunk])
                with builder.if_then(builder.icmp_signed("==", fresh, _I64(0))):
                    for row in range(rows):
                        for chunk in range(chunks):
                            builder.store(read(at(out_rows[row], _LINE * chunk, sums)), totals[row][chunk])
                with cgutils.for_range(builder, steps) as step:
                    if prefetch:
                        line = at(following, builder.mul(step.index, _I64(4 * _LINE)), ir.IntType(8))
                        _fetch(builder, line)
                    right = []
                    for chunk in range(chunks):
                        address = at(ws[chunk], builder.mul(step.index, w_step), _HALVES if kind.widened else operand)
                        if kind.widened:
                            bits = builder.shl(builder.zext(read(address), _WHOLES), _splat(_I32(16)))
                            right.append(builder.bitcast(bits, _FLOATS))
                        else:
                            right.append(read(address))
                    for row in range(rows):
                        one = read(at(x_rows[row], builder.mul(step.index, _I64(4)), given))
                        left = _spread(builder, one)
                        left = builder.bitcast(left, operand) if left.type != operand else left
                        for chunk in range(chunks):
                            total = builder.load(totals[row][chunk])
                            both = [total, left, right[chunk]] if kind.together > 1 else [left, right[chunk], total]
                            builder.store(builder.call(multiply, both), totals[row][chunk])
                for row in range(rows):
                    for chunk in range(chunks):
                        found = builder.store(builder.load(totals[row][chunk]), at(out_rows[row], _LINE * chunk, sums))
                        found.align = 4
                return context.get_dummy_value()

            return types.void(*[types.int64] * 12), code

        return tile

    def _splat(value: Any) -> Any:
        return ir.Constant(_WHOLES, [value] * 16)

    def _spread(builder: Any, value: Any) -> Any:
        """One number in all sixteen places."""
        vector = ir.VectorType(value.type, 16)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(_WHOLES, None))

    def _fetch(builder: Any, pointer: Any) -> None:
        """Tell the processor that a line of memory will be read."""
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _I32, _I32, _I32])
        builder.call(
            cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"),
            [pointer, _I32(0), _I32(2), _I32(1)],  # to read, into the second level, data
        )

    def _of_rows(kind: Kind, chunks: int, prefetch: bool = False) -> Any:
        """The tile of a kind for 1 to 6 rows, whichever `rows` says; the arguments of `_tile` follow."""
        one, two, three, four, five, six = (_tile(kind, rows, chunks, prefetch) for rows in range(1, ROWS + 1))

        @loop
        def tile(
            rows: Any, x: Any, x_row: Any, w0: Any, w1: Any, w2: Any, w3: Any, w_step: Any, steps: Any, out: Any,
            out_row: Any, fresh: Any, following: Any,
        ) -> None:  # fmt: skip
            if rows == 6:
                six(x, x_row, w0, w1, w2, w3, w_step, steps, out, out_row, fresh, following)
            elif rows == 5:
                five(x, x_row, w0, w1, w2, w3, w_step, steps, out, out_row, fresh, following)
            elif rows == 4:
                four(x, x_row, w0, w1, w2, w3, w_step, steps, out, out_row, fresh, following)
            elif rows == 3:
                three(x, x_row, w0, w1, w2, w3, w_step, steps, out, out_row, fresh, following)
            elif rows == 2:
                two(x, x_row, w0, w1, w2, w3, w_step, steps, out, out_row, fresh, following)
            else:
                one(x, x_row, w0, w1, w2, w3, w_step, steps, out, out_row, fresh, following)

        return tile

    product_fp32, product_bf16 = (_of_rows(kind, 4, prefetch=True) for kind in (FP32, BF16))
    product_int8 = _of_rows(INT8, 4, prefetch=True) if has(INT8.feature) else product_fp32  # which is not called then
    scores_fp32, scores_bf16 = (_of_rows(kind, 4) for kind in (FP32, BF16))
    sums_fp32, sums_bf16 = (_of_rows(kind, 4) for kind in (FP32, WIDENED))
    sum_fp32, sum_bf16 = (_of_rows(kind, 1) for kind in (FP32, WIDENED))
