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
from typing import Any

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t


@dataclass(frozen=True)
class Machine:
    """Cores and bytes of memory of this machine, and how fast it has done things before."""

    cores: int
    memory: float
    measured: Callable[[str], float | None] = field(default=lambda name: None)
    execution: Any = None
    """how the stage that asks is carried out (`core.stage.Execution`), where that is known"""

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


@dataclass(frozen=True)
class Device:
    """What computes, by its data sheet: peak operations a second in 16 bits, bytes a second and bytes of memory."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    fp32_flops: float = 0.0

    def peak(self, bits: int = 16) -> float:
        """Operations a second at the most, in 16 or 32 bits."""
        return self.flops if bits == 16 or not self.fp32_flops else self.fp32_flops


def devices(own: Path | None = None) -> dict[str, Device]:
    """Devices by name: `devices.yaml` beside this file, and the user's `own` file on top of it."""
    import yaml

    files = [Path(__file__).with_name("devices.yaml"), *([own] if own and own.is_file() else [])]
    found: dict[str, Device] = {}
    for file in files:
        for name, values in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
            try:
                found[str(name)] = Device(str(name), **{key: float(value) for key, value in values.items()})
            except (TypeError, ValueError, AttributeError) as error:
                raise FledgeError(
                    Problem(
                        t("a device is described by its numbers"),
                        where=f"{file} ({name})",
                        found=str(error),
                        allowed="flops, bandwidth, memory, fp32_flops",
                    )
                ) from None
    return found


def device_named(name: str, own: Path | None = None) -> Device:
    """The device of that name, whatever its case. Raises FledgeError with the names that there are."""
    known = devices(own)
    for key, device in known.items():
        if key.lower() == name.lower():
            return device
    raise FledgeError(
        Problem(
            t('there is no device "{name}"', name=name),
            allowed=listing(list(known), 40),
            fix=did_you_mean(name, known) or t("describe it in {file}", file=own or "devices.yaml"),
        )
    )


def card() -> tuple[str, float]:
    """Name and bytes of memory of the first NVIDIA card; ("", 0) where there is none."""
    for line in graphics_cards():
        name, _, size = line.rpartition(",")
        number = size.strip().split(" ")[0]
        return name.strip(), float(number) * 2**20 if number.isdigit() else 0.0
    return "", 0.0
