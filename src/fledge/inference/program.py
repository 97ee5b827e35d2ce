"""Programs: lists of instructions (`loops.py`) that all threads go through together, compiled for this processor.

Two hundred instructions, all layers of a small model, are one call. Called one by one, from Python through PyTorch,
they take longer to begin than to read the weights of one row.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fledge.inference import int4, kernels, loops, tiles
from fledge.inference.loops import PAIR, WIDTH, Op

try:
    from numba import carray, cfunc, types

    from fledge.inference.kernels import FAST
    from fledge.inference.loops import all_of
except ImportError:
    pass


@cache
def _source() -> int:
    """A number that changes with the loops: Numba's cache looks at one file only, and they call into others."""
    digest = hashlib.sha256()
    for module in (int4, kernels, loops, tiles):
        digest.update(Path(module.__file__).read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")


@cache
def _compiled(dtype: torch.dtype) -> Any:
    """The loops for a number format."""
    kernels.openmp()  # whose functions the loops call
    source = _source()

    def in_fp32(given: Any) -> None:
        all_of(given, loops.in_fp32, carray(given, (4,), np.int64)[1] + 0 * source)

    def in_bf16(given: Any) -> None:
        all_of(given, loops.in_bf16, carray(given, (4,), np.int64)[1] + 0 * source)

    signature = types.void(types.CPointer(types.int64))
    run = in_bf16 if dtype == torch.bfloat16 else in_fp32
    make = partial(cfunc, signature, fastmath=FAST, error_model="numpy")
    try:
        return make(cache=True)(run)
    except RuntimeError:  # nowhere to keep it: neither beside this file nor in the user's cache
        return make()(run)


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the loops can be had for this number format here."""
    kinds = {torch.float32: tiles.FP32, torch.bfloat16: tiles.BF16}
    return kernels.available(dtype, device) and tiles.has(kinds[dtype].feature)


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether they are the fastest for matrix products, too."""
    return available(dtype, device) and tiles.has("avx512f") and tiles.has(tiles.INT8.feature)


def attention_room(dim: int, keys: int) -> int:
    """Bytes beside its registers that a thread needs for attention: query, sums and scores of six rows."""
    return -(-6 * (8 * max(dim, 16) + 4 * tiles.COLUMNS * -(-keys // tiles.COLUMNS)) // 64) * 64


class Program:
    """Instructions that run together, in order. What changes from run to run has a name in them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._loops = _compiled(dtype)
        self._names: dict[str, int] = {}
        self._rows: list[list[int]] = []
        self._places: list[tuple[int, int, int]] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.unpacked = 0
        """bytes of unpacked weights that a thread holds"""
        self._ready = False

    def add(self, op: Op, *arguments: int | str) -> None:
        """One more instruction; a string is the name of a value that `run` is given."""
        row = [int(op), *(0 if isinstance(each, str) else each for each in arguments)]
        for column, each in enumerate(arguments, 1):
            if isinstance(each, str):
                self._places.append((len(self._rows), column, self._names.setdefault(each, len(self._names))))
        self._rows.append(row + [0] * (WIDTH - len(row)))
        self._ready = False

    def run(self, work: int, room: int = 0, **values: int) -> None:
        """Run them over `values`. `work`: multiplications; `room`: see `attention_room`, where there is attention."""
        if not self._ready:
            self._table = np.array(self._rows, dtype=np.int64)
            self._rows_of, self._columns_of, self._values_of = np.array(self._places, dtype=np.int64).reshape(-1, 3).T
            self._ready = True
        given = np.array([values[name] for name in self._names], dtype=np.int64)
        self._table[self._rows_of, self._columns_of] = given[self._values_of]
        threads = torch.get_num_threads() if work >= kernels.LARGE else 1
        room = max(room, 2 * PAIR * 4 + self.unpacked)
        if len(self._scratch) < threads * room:
            self._scratch = torch.empty(threads * room, dtype=torch.uint8)
        head = (ctypes.c_int64 * 4)(self._table.ctypes.data, len(self._rows), self._scratch.data_ptr(), room)
        if threads == 1:
            self._loops.ctypes(head)
        else:
            kernels.openmp().GOMP_parallel(self._loops.address, head, threads, 0)


def run(dtype: torch.dtype, work: int, op: Op, *arguments: int, room: int = 0) -> None:
    """A single instruction; `work` and `room` as in `Program.run`."""
    program = Program(dtype)
    program.add(op, *arguments)
    program.run(work, room)
