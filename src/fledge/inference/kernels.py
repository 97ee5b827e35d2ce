"""Small loops of a step that PyTorch has no single operation for, compiled for the processor by Numba.

Between two matrix products a layer has little to compute and, in PyTorch, some fifty operations to call: at one row
their overhead takes longer than reading the weights, and attention has to bring scattered keys together first. Here
attention reads the blocks where they lie; norm, rotation, gate and 8-bit rounding are one pass each. A kernel is
compiled once for a shape and number format (one to three seconds, kept on disk) and runs in the same team of threads
as PyTorch's own loops, started through the OpenMP library that PyTorch has loaded.

Every row is computed by itself and in order: no result depends on what else is in the step. Without Numba or that
library (macOS), on GPUs and in other number formats the engine computes the same with PyTorch (`paged.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import numba
    from llvmlite import binding, ir
    from numba import carray, cfunc, njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:  # the wheels are not everywhere
    numba = None

_LARGE = 60_000
"""multiplications (or so) from which waking the other threads pays"""
_LOWEST = np.float32(-3e38)
_FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}
"""what the compiler may do to sums: their order is fixed when it compiles. It may not forget that there are NaNs."""


@cache
def _openmp() -> Any:
    """The OpenMP library that this process has loaded already (PyTorch's), or None."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line and "torch" in line}
    if len(found) != 1:
        return None
    library = ctypes.CDLL(found.pop())
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    library.omp_pause_resource_all.argtypes, library.omp_pause_resource_all.restype = [ctypes.c_int], ctypes.c_int
    if numba is None:
        return library
    for name in ("omp_get_thread_num", "omp_get_num_threads"):  # under a name of ours: another copy may be loaded, too
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        binding.add_symbol(f"fledge_{name}", address)
    return library


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels can be had for this number format here."""
    return (
        numba is not None
        and device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and _openmp() is not None
    )


@dataclass(frozen=True)
class Kernel:
    """A compiled loop: its arguments are whole numbers (addresses, sizes, the bits of floats)."""

    compiled: Any

    def __call__(self, work: int, *arguments: int) -> None:
        """Run it; `work` says how much there is to do, in multiplications."""
        given = (ctypes.c_int64 * len(arguments))(*arguments)
        if work < _LARGE:
            self.compiled.ctypes(given)
        else:
            _openmp().GOMP_parallel(self.compiled.address, given, torch.get_num_threads(), 0)


def rest() -> None:
    """Let the calling thread's team of threads go; its next parallel loop gets a new one.

    OpenMP keeps a team for every thread that has ever computed. Once there are more threads in teams than processors,
    GNU's library lets all of them sleep between two loops instead of waiting awake, and every loop begins with waking
    the others: one stream of SmolLM2-135M falls from 48 to 33 tokens a second because another thread had a team. So
    whoever hands the work over lets go, and so does an engine that is idle.
    """
    if (library := _openmp()) is not None:
        library.omp_pause_resource_all(1)  # omp_pause_soft


def bits(value: float) -> int:
    """A float as the whole number that a kernel takes."""
    return int(np.float32(value).view(np.uint32))


def of(tensor: Tensor) -> int:
    """A contiguous tensor as the whole number that a kernel takes. Somebody has to hold it until the kernel is done."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()


if numba is not None:
    _thread = types.ExternalFunction("fledge_omp_get_thread_num", types.int32())
    _threads = types.ExternalFunction("fledge_omp_get_num_threads", types.int32())

    @intrinsic  # type: ignore[misc]
    def _at(typing: Any, address: Any) -> Any:
        """The pointer to an address."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], cgutils.voidptr_t)

        return types.voidptr(types.int64), code

    @intrinsic  # type: ignore[misc]
    def _float(typing: Any, pattern: Any) -> Any:
        """The float of a pattern of 32 bits."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.bitcast(given[0], ir.FloatType())

        return types.float32(types.uint32), code

    @intrinsic  # type: ignore[misc]
    def _pattern(typing: Any, value: Any) -> Any:
        """The 32 bits of a float."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.bitcast(given[0], ir.IntType(32))

        return types.uint32(types.float32), code

    @intrinsic  # type: ignore[misc]
    def _soon(typing: Any, address: Any) -> Any:
        """Tell the processor that the 64 bytes at an address will be read."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
            prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            pointer = builder.inttoptr(given[0], cgutils.voidptr_t)
            builder.call(prefetch, [pointer, number(0), number(3), number(1)])  # to read, near, data
            return context.get_dummy_value()

        return types.void(types.int64), code

    @njit(inline="always")
    def _wide(half: Any) -> Any:
        """bfloat16, as 16 bits, to float32."""
        return _float(np.uint32(half) << np.uint32(16))

    @njit(inline="always")
    def _narrow(value: Any) -> Any:
        """float32 to the nearest bfloat16, as 16 bits; NaN stays NaN."""
        p = _pattern(value)
        if (p & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            return np.uint16(0x7FC0)
        return np.uint16((p + np.uint32(0x7FFF) + ((p >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    @njit(inline="always")
    def _exp(x: Any) -> Any:
        """e^x for x ≤ 88, to a relative 1e-7 (range reduction and the minimax polynomial of Cephes' expf)."""
        unknown = x - x  # 0, or NaN where x is none: what follows would lose it
        x = max(x, np.float32(-87.0))
        n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
        r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1.0)
        return p * _float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)) + unknown


def _compile(body: Callable[..., None]) -> Kernel:
    _openmp()  # whose functions the compiled loop names
    signature = types.void(types.CPointer(types.int64))
    compiled = cfunc(signature, fastmath=_FAST, error_model="numpy", cache=True)(body)  # a division by 0 is infinity
    return Kernel(compiled)


def _format(dtype: torch.dtype) -> tuple[int, Any, int]:
    """(whether bfloat16, the type that NumPy reads, bytes)"""
    return (1, np.uint16, 2) if dtype == torch.bfloat16 else (0, np.float32, 4)


@cache
def attention(dtype: torch.dtype, dim: int, shared: int, block: int) -> Kernel:
    """Causal attention over a pool of blocks: each new token to its sequence's keys, softmax in fp32.

    Arguments: query and out (T, H, D), pool (2, KV, blocks, block, D), sequences (n, 4: first token in the step,
    tokens, position of the first, row of the table), table (rows, width), n, H, KV, blocks, width, bits(scale),
    scratch (a row of `room` floats for each thread), room, keys (a multiple of `block`), window (0: none),
    slopes (H,) or 0, bits(softcap) (0: none). `shared`: query heads for each key head, H / KV.
    """
    half, kind, size = _format(dtype)
    lanes = min(16, dim)

    def body(given: Any) -> None:
        a = carray(given, (17,), np.int64)
        query_at, pool_at, out_at, table_at, count = a[0], a[1], a[2], a[4], a[5]
        heads, groups, blocks, width, scale = a[6], a[7], a[8], a[9], _float(np.uint32(a[10]))
        window, softcap = a[14], _float(np.uint32(a[16]))
        sequences = carray(_at(a[3]), (count, 4), np.int64)
        mine = a[11] + _thread() * a[12] * 4
        q = carray(_at(mine + shared * a[13] * 4), (shared, dim), np.float32)
        o = carray(_at(mine + shared * (a[13] + dim) * 4), (shared, dim), np.float32)
        for item in range(_thread(), count * groups, _threads()):
            head, at = item % groups, item // groups
            table = carray(_at(table_at + sequences[at, 3] * width * 8), (width,), np.int64)
            for token in range(sequences[at, 1]):
                end = sequences[at, 2] + token + 1
                start = max(end - window, 0) if window > 0 else 0
                offset = ((sequences[at, 0] + token) * heads + head * shared) * dim * size
                given_q = carray(_at(query_at + offset), (shared, dim), kind)
                for g in range(shared):
                    for d in range(dim):
                        q[g, d] = (_wide(given_q[g, d]) if half else given_q[g, d]) * scale
                        o[g, d] = np.float32(0)
                low, high = start // block, (end + block - 1) // block
                for b in range(low, high):
                    for line in range(0, block * dim * size, 64):  # keys of the next block, values of this one
                        if b + 1 < high:
                            _soon(pool_at + (head * blocks + table[b + 1]) * block * dim * size + line)
                        _soon(pool_at + ((groups + head) * blocks + table[b]) * block * dim * size + line)
                    s = carray(_at(mine + b * block * 4 * shared), (shared, block), np.float32)
                    k = carray(_at(pool_at + (head * blocks + table[b]) * block * dim * size), (block, dim), kind)
                    for g in range(shared):
                        for j in range(block):
                            total = np.float32(0)
                            for d in range(dim):
                                total += q[g, d] * (_wide(k[j, d]) if half else k[j, d])
                            s[g, j] = total
                    if softcap > 0:
                        for g in range(shared):
                            for j in range(block):
                                e = _exp(min(max(s[g, j] / softcap, np.float32(-40)), np.float32(40)) * np.float32(2))
                                s[g, j] = softcap * (np.float32(1) - np.float32(2) / (e + np.float32(1)))
                    if a[15] != 0:
                        slopes = carray(_at(a[15] + head * shared * 4), (shared,), np.float32)
                        for g in range(shared):
                            for j in range(block):
                                s[g, j] += slopes[g] * np.float32(b * block + j)
                    if b == low or b == high - 1:
                        for j in range(block):
                            if b * block + j < start or b * block + j >= end:
                                for g in range(shared):
                                    s[g, j] = _LOWEST
                for g in range(shared):
                    highest = _LOWEST
                    for b in range(low, high):
                        s = carray(_at(mine + b * block * 4 * shared), (shared, block), np.float32)
                        for j in range(block):
                            highest = max(highest, s[g, j])
                    total = np.float32(0)
                    for b in range(low, high):
                        s = carray(_at(mine + b * block * 4 * shared), (shared, block), np.float32)
                        for j in range(block):
                            e = _exp(s[g, j] - highest)
                            e = np.float32(0) if s[g, j] == _LOWEST else e
                            s[g, j] = e
                            total += e
                    share = np.float32(1) / total
                    for b in range(low, high):
                        s = carray(_at(mine + b * block * 4 * shared), (shared, block), np.float32)
                        for j in range(block):
                            s[g, j] *= share
                for b in range(low, high):
                    row = ((groups + head) * blocks + table[b]) * block * dim
                    v = carray(_at(pool_at + row * size), (block, dim), kind)
                    s = carray(_at(mine + b * block * 4 * shared), (shared, block), np.float32)
                    for g in range(shared):
                        for first in range(0, dim, lanes):  # sixteen sums side by side: a register of the processor
                            for d in range(lanes):
                                total = o[g, first + d]
                                for j in range(block):
                                    total += s[g, j] * (_wide(v[j, first + d]) if half else v[j, first + d])
                                o[g, first + d] = total
                out = carray(_at(out_at + offset), (shared, dim), kind)
                for g in range(shared):
                    for d in range(dim):
                        out[g, d] = _narrow(o[g, d]) if half else o[g, d]

    return _compile(body)


@cache
def rms_norm(dtype: torch.dtype) -> Kernel:
    """out = x / √(mean(x²) + ε) · w by row (Zhang & Sennrich, 2019). Arguments: x, w, out, rows, width, bits(ε)."""
    half, kind, size = _format(dtype)

    def body(given: Any) -> None:
        a = carray(given, (6,), np.int64)
        width = a[4]
        w, least = carray(_at(a[1]), (width,), kind), _float(np.uint32(a[5]))
        for row in range(_thread(), a[3], _threads()):
            x = carray(_at(a[0] + row * width * size), (width,), kind)
            out = carray(_at(a[2] + row * width * size), (width,), kind)
            total = np.float32(0)
            for d in range(width):
                value = _wide(x[d]) if half else x[d]
                total += value * value
            scale = np.float32(1) / np.sqrt(total / np.float32(width) + least)
            for d in range(width):
                value = (_wide(x[d]) if half else x[d]) * scale * (_wide(w[d]) if half else w[d])
                out[d] = _narrow(value) if half else value

    return _compile(body)


@cache
def rotate_and_keep(dtype: torch.dtype, dim: int, block: int) -> Kernel:
    """Positions into query and key, query to `out`, key and value to their slots of the pool.

    Arguments: mixed (T, (H + 2 KV) · D), cos, sin (T, D; sin with the sign of the half it meets), out (T, H, D),
    pool (2, KV, blocks, block, D), slots (n,), n, T, blocks, H, KV. Tokens from n on are
    nobody's: nothing is kept of them.
    """
    half, kind, size = _format(dtype)
    middle = dim // 2

    def body(given: Any) -> None:
        a = carray(given, (11,), np.int64)
        slots, heads, kv_heads = carray(_at(a[5]), (a[6],), np.int64), a[9], a[10]
        width = (heads + 2 * kv_heads) * dim
        for token in range(_thread(), a[7], _threads()):
            cos = carray(_at(a[1] + token * dim * size), (dim,), kind)
            sin = carray(_at(a[2] + token * dim * size), (dim,), kind)
            for head in range(heads + 2 * kv_heads):
                x = carray(_at(a[0] + (token * width + head * dim) * size), (dim,), kind)
                if head < heads:
                    target = a[3] + (token * heads + head) * dim * size
                elif token < a[6]:
                    slot, plane = slots[token], head - heads
                    target = a[4] + ((plane * a[8] + slot // block) * block + slot % block) * dim * size
                else:
                    continue
                out = carray(_at(target), (dim,), kind)
                if head >= heads + kv_heads:
                    for d in range(dim):
                        out[d] = x[d]
                elif half:
                    for d in range(middle):
                        out[d] = _narrow(_wide(x[d]) * _wide(cos[d]) + _wide(x[d + middle]) * _wide(sin[d]))
                    for d in range(middle):
                        e = d + middle
                        out[e] = _narrow(_wide(x[e]) * _wide(cos[e]) + _wide(x[d]) * _wide(sin[e]))
                else:
                    for d in range(middle):
                        out[d] = x[d] * cos[d] + x[d + middle] * sin[d]
                    for d in range(middle):
                        out[d + middle] = x[d + middle] * cos[d + middle] + x[d] * sin[d + middle]

    return _compile(body)


@cache
def gate(dtype: torch.dtype) -> Kernel:
    """out = silu(x[:, :width]) · x[:, width:] (SwiGLU: Shazeer, 2020). Arguments: x, out, rows, width."""
    half, kind, size = _format(dtype)

    def body(given: Any) -> None:
        a = carray(given, (4,), np.int64)
        width = a[3]
        for row in range(_thread(), a[2], _threads()):
            x = carray(_at(a[0] + row * 2 * width * size), (2, width), kind)
            out = carray(_at(a[1] + row * width * size), (width,), kind)
            for d in range(width):
                value, up = (_wide(x[0, d]), _wide(x[1, d])) if half else (x[0, d], x[1, d])
                value = value / (np.float32(1) + _exp(min(-value, np.float32(80)))) * up
                out[d] = _narrow(value) if half else value

    return _compile(body)


@cache
def to_int8(dtype: torch.dtype) -> Kernel:
    """Rows in 8 bits: whole numbers -127 … 127, and a scale each. Arguments: x, out, scales, rows, width."""
    half, kind, size = _format(dtype)

    def body(given: Any) -> None:
        a = carray(given, (5,), np.int64)
        scales, width = carray(_at(a[2]), (a[3],), np.float32), a[4]
        for row in range(_thread(), a[3], _threads()):
            x = carray(_at(a[0] + row * width * size), (width,), kind)
            out = carray(_at(a[1] + row * width), (width,), np.int8)
            highest = np.float32(1e-12)
            for d in range(width):
                highest = max(highest, abs(_wide(x[d]) if half else x[d]))
            scale = np.float32(127) / highest
            for d in range(width):
                value = (_wide(x[d]) if half else x[d]) * scale + np.float32(128.5)
                out[d] = np.int8(np.int32(value) - np.int32(128))  # to the nearest: the whole part of what is positive
            scales[row] = highest / np.float32(127)

    return _compile(body)


@cache
def from_int8(dtype: torch.dtype, whole: bool) -> Kernel:
    """out = x · scale of the row · scale of the column [+ bias] [+ residual].

    Arguments: x (`whole`: int32, else fp32), row scales, column scales, bias or 0, residual or 0, out, rows, width.
    """
    half, kind, size = _format(dtype)
    given_kind = np.int32 if whole else np.float32

    def body(given: Any) -> None:
        a = carray(given, (8,), np.int64)
        by_row, width = carray(_at(a[1]), (a[6],), np.float32), a[7]
        by_column, bias = carray(_at(a[2]), (width,), np.float32), carray(_at(a[3]), (width,), kind)
        for row in range(_thread(), a[6], _threads()):
            x = carray(_at(a[0] + row * width * 4), (width,), given_kind)
            more = carray(_at(a[4] + row * width * size), (width,), kind)
            out = carray(_at(a[5] + row * width * size), (width,), kind)
            scale = by_row[row]
            if a[3] != 0 and a[4] != 0:
                for d in range(width):
                    value = np.float32(x[d]) * by_column[d] * scale + (_wide(bias[d]) if half else bias[d])
                    value += _wide(more[d]) if half else more[d]
                    out[d] = _narrow(value) if half else value
            elif a[3] != 0:
                for d in range(width):
                    value = np.float32(x[d]) * by_column[d] * scale + (_wide(bias[d]) if half else bias[d])
                    out[d] = _narrow(value) if half else value
            elif a[4] != 0:
                for d in range(width):
                    value = np.float32(x[d]) * by_column[d] * scale + (_wide(more[d]) if half else more[d])
                    out[d] = _narrow(value) if half else value
            else:
                for d in range(width):
                    value = np.float32(x[d]) * by_column[d] * scale
                    out[d] = _narrow(value) if half else value

    return _compile(body)
