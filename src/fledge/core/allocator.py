"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


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
