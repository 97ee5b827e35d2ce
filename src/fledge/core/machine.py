"""What this machine is, as far as estimates and `fledge doctor` need it. Reads files, imports nothing heavy."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Cores and bytes of memory of this machine, and how fast it has done things before."""

    cores: int
    memory: float
    measured: Callable[[str], float | None] = field(default=lambda name: None)

    def rate(self, name: str, default: float) -> float:
        """Units per second of the named work as measured on this machine; `default` per core until it has been."""
        return self.measured(name) or default * self.cores


def this_machine(measured: Callable[[str], float | None] = lambda name: None) -> Machine:
    """The machine we run on."""
    return Machine(cores(), memory(), measured)


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> float:
    """Bytes of memory, the container's limit included."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, float(text))
    return total


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def graphics_cards() -> tuple[str, ...]:
    """Names of the NVIDIA cards, asked of their driver."""
    if not shutil.which("nvidia-smi"):
        return ()
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    return tuple(line.strip() for line in asked.stdout.splitlines() if asked.returncode == 0)
