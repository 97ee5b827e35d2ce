"""How fast this machine multiplies matrices: the yardstick of model FLOPs utilisation (MFU).

On a graphics card that we know it is the data sheet's dense rate in the run's format; everywhere else it is measured,
a fraction of a second once a process, and remembered in the database of rates (`rate/matmul.…`).
"""

from __future__ import annotations

import re
import sqlite3
import time
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from fledge.core.db import Database
from fledge.core.events import Emitter
from fledge.core.machine import devices
from fledge.core.store import home

SIDE = 2048  # of the square matrices: large enough to be bound by arithmetic, 17 GFLOP a product
SECONDS = 0.25


@dataclass(frozen=True)
class MatrixRate:
    """Floating-point operations a second of one device in one format, and where the number comes from."""

    value: float
    source: str  # "measured", or "data sheet of H100"


def matrix_rate(device: str, dtype: str, events: Emitter | None = None) -> MatrixRate:
    """The rate of `device` ("cpu", "cuda:0") in `dtype` ("bfloat16"). What is measured is told to `events`."""
    kind = torch.device(device).type
    if kind == "cuda" and (known := data_sheet(torch.cuda.get_device_name(device), dtype)):
        return known
    name = f"matmul.{kind}.{dtype}.{torch.get_num_threads()}"
    if (before := _remembered(name)) is not None:
        return MatrixRate(before, "measured")
    found = measure(device, dtype)
    if events is not None:
        events.metric(f"rate/{name}", found)
    return MatrixRate(found, "measured")


def data_sheet(card: str, dtype: str) -> MatrixRate | None:
    """What the maker says of a card called `card` (`core/devices.yaml`, and the user's own); None for one not there."""
    words = re.split(r"[\s_-]+", card.lower())
    words += [first + second for first, second in pairwise(words)]  # RTX 4090 is RTX4090
    table = devices(home() / "devices.yaml")
    known = [device for name, device in table.items() if set(name.lower().split("-")) <= set(words)]
    if not known:
        return None
    device = max(known, key=lambda device: len(device.name))
    return MatrixRate(device.peak(32 if dtype == "float32" else 16), f"data sheet of {device.name}")


@cache
def measure(device: str, dtype: str) -> float:
    """Operations a second of a product of two square matrices: the best of several, for about a quarter of a second."""
    side = SIDE if dtype != "float16" or device != "cpu" else SIDE // 4  # fp16 is slow on most processors
    generator = torch.Generator().manual_seed(0)  # the run's own randomness is left as it is
    a = torch.randn(side, side, generator=generator).to(device, getattr(torch, dtype))
    best, ends = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < ends:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _remembered(name: str) -> float | None:
    file = home() / "fledge.db"
    try:
        return Database(file).rate(name) if file.exists() else None
    except sqlite3.Error:
        return None
