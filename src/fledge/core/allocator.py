"""What the C library does with memory that is freed, and how much of it the matrix library keeps for itself."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and PyTorch's on top of it
PREPARED, A_LENGTH = 40, 6  # products that a step of a decoder has: about 20 by its layers, 6 in attention
MULTIPLE = 32  # tokens to which attention rounds lengths up


def keep_few_products(longest: int = 512) -> None:
    """Keep the machine code of few products of matrices on CPUs, instead of 1,024 in each of two caches.

    Kept are as many as a step has: `PREPARED` for the layers, and `A_LENGTH` for each length that a document of up to
    `longest` tokens can have inside attention (`models.block_attention`; 0: rows hold one text each). Machine code
    takes some 256 kB a kernel. Where rows differ in length from step to step, new code comes with every step and is
    seldom used again; and it lies in the holes of what steps free, so that large pieces fit there no more and the heap
    grows by more than the code. The libraries read this at the first 16-bit product of a process: later it changes
    nothing. What the environment says already stays.
    """
    for name in _CACHES:
        os.environ.setdefault(name, str(PREPARED + A_LENGTH * -(-longest // MULTIPLE)))


@cache
def keep_freed_memory() -> None:
    """Tell the allocator to keep what is freed, for the rest of this process. Nothing happens outside glibc.

    Pieces of 32 MB and more (the most that glibc allows to say) still go back: where row lengths vary from step to
    step, they would find no hole that fits, and the memory would grow by one of them after another.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**25)


def give_back() -> None:
    """Return to the system what is free, wherever it lies in the heap. Nothing happens outside glibc."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
