"""What compiled loops (`loops.py`) stand on: addresses, number formats, and PyTorch's own team of threads.

Numba compiles a loop once for the processor and a number format (seconds, kept on disk). It runs in the same team of
threads as PyTorch's own loops, started through the OpenMP library that PyTorch has loaded. Without Numba or that
library (macOS), on GPUs and in other number formats the engine computes the same with PyTorch (`paged.py`).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import numba
    from llvmlite import binding, ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:  # the wheels are not everywhere
    numba = None

LARGE = 60_000
"""multiplications (or so) from which waking the other threads pays"""
FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}
"""what the compiler may do to sums: their order is fixed when it compiles. It may not forget that there are NaNs."""


@cache
def openmp() -> Any:
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
    # Under names of ours: another copy may be loaded, too.
    for name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        binding.add_symbol(f"fledge_{name}", address)
    return library


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels can be had for this number format here."""
    return (
        numba is not None and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and openmp() is not None
    )


def rest() -> None:
    """Let the calling thread's team of threads go; its next parallel loop gets a new one.

    OpenMP keeps a team for every thread that has ever computed. Once there are more threads in teams than processors,
    GNU's library lets all of them sleep between two loops instead of waiting awake, and every loop begins with waking
    the others: one stream of SmolLM2-135M falls from 48 to 33 tokens a second because another thread had a team. So
    whoever hands the work over lets go, and so does an engine that is idle.
    """
    if (library := openmp()) is not None:
        library.omp_pause_resource_all(1)  # omp_pause_soft


def bits(value: float) -> int:
    """A float as the whole number that a kernel takes."""
    return int(np.float32(value).view(np.uint32))


def of(tensor: Tensor) -> int:
    """A contiguous tensor as the whole number that a kernel takes. Somebody has to hold it until the kernel is done."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()


if numba is not None:
    thread_number = types.ExternalFunction("fledge_omp_get_thread_num", types.int32())
    thread_count = types.ExternalFunction("fledge_omp_get_num_threads", types.int32())

    barrier = types.ExternalFunction("fledge_GOMP_barrier", types.void())

    def _memory(kind: Any, number: Any) -> tuple[Any, Any]:
        """What reads a number from a place of an array at an address, and what writes one there."""

        def place_of(builder: Any, address: Any, place: Any) -> Any:
            return builder.gep(builder.inttoptr(address, kind.as_pointer()), [place])

        @intrinsic  # type: ignore[misc]
        def load(typing: Any, address: Any, place: Any) -> Any:
            def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
                return builder.load(place_of(builder, *given))

            return number(types.int64, types.int64), code

        @intrinsic  # type: ignore[misc]
        def store(typing: Any, address: Any, place: Any, value: Any) -> Any:
            def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
                builder.store(given[2], place_of(builder, *given[:2]))
                return context.get_dummy_value()

            return types.void(types.int64, types.int64, number), code

        return load, store

    load16, store16 = _memory(ir.IntType(16), types.uint16)
    load32, store32 = _memory(ir.IntType(32), types.uint32)

    @intrinsic  # type: ignore[misc]
    def pointer(typing: Any, address: Any) -> Any:
        """The pointer to an address."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], cgutils.voidptr_t)

        return types.voidptr(types.int64), code

    @intrinsic  # type: ignore[misc]
    def as_float(typing: Any, pattern: Any) -> Any:
        """The float of a pattern of 32 bits."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.bitcast(given[0], ir.FloatType())

        return types.float32(types.uint32), code

    @intrinsic  # type: ignore[misc]
    def as_pattern(typing: Any, value: Any) -> Any:
        """The 32 bits of a float."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.bitcast(given[0], ir.IntType(32))

        return types.uint32(types.float32), code

    @intrinsic  # type: ignore[misc]
    def prefetch(typing: Any, address: Any) -> Any:
        """Tell the processor that the 64 bytes at an address will be read."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
            fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            place = builder.inttoptr(given[0], cgutils.voidptr_t)
            builder.call(fetch, [place, number(0), number(3), number(1)])  # to read, near, data
            return context.get_dummy_value()

        return types.void(types.int64), code

    loop = njit(fastmath=FAST, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
    """a function of a loop; a division by 0 is infinity there"""

    @loop
    def widen(half: Any) -> Any:
        """bfloat16, as 16 bits, to float32."""
        return as_float(np.uint32(half) << np.uint32(16))

    @loop
    def narrow(value: Any) -> Any:
        """float32 to the nearest bfloat16, as 16 bits; NaN stays NaN."""
        p = as_pattern(value)
        if (p & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            return np.uint16(0x7FC0)
        return np.uint16((p + np.uint32(0x7FFF) + ((p >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    @loop
    def exp(x: Any) -> Any:
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
        return p * as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)) + unknown
