"""What every benchmark shares: an environment for each peer, pairs of runs, and the one line in which it ends.

A peer is installed in an environment of its own below `.benchmarks/`, made when first asked for, so that its
requirements never meet ours. Each side runs as a process of its own, the sides in turn, and the median of their runs
counts; the last line that a benchmark prints is one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HOME = Path(os.environ.get("FLEDGE_BENCHMARKS", Path(__file__).parent.parent / ".benchmarks"))


def environment(name: str, *requirements: str, without: Sequence[str] = ()) -> Path:
    """The Python of an environment that holds a peer's `requirements` (pip's words), made once. `without`: packages
    that they bring and that do harm."""
    key = hashlib.sha256(json.dumps([sys.version, requirements]).encode()).hexdigest()[:8]
    folder = HOME / f"{name}-{key}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {' '.join(requirements)} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-qq"]
        subprocess.run([*pip, "install", *requirements], check=True)
        if without:
            subprocess.run([*pip, "uninstall", "--yes", *without], check=True)
        (folder / "ready").touch()
    return python


@dataclass(frozen=True)
class Run:
    """One run of a command: its wall time, the largest memory of any of its processes, what it printed."""

    seconds: float
    peak_bytes: int
    output: str


def measure(command: Sequence[str | Path], **variables: str) -> Run:
    """Run a command to its end. Raises CalledProcessError, with what it said, when it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, env={**os.environ, **variables})
        _, status, usage = os.wait4(process.pid, 0)  # its own memory, and that of the processes it waited for
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, err):
            stream.seek(0)
        output, errors = out.read().decode(), err.read().decode()
    if process.returncode:
        print(output[-4_000:], errors[-4_000:], sep="\n", file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, list(map(str, command)))
    return Run(seconds, 1024 * usage.ru_maxrss, output)


def in_turn(commands: Mapping[str, Sequence[str | Path]], times: int) -> dict[str, list[Run]]:
    """Every command `times` times, one after another and round again, so that all meet the same weather."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(times):
        for name, command in commands.items():
            runs[name].append(measure(command))
            print(f"{name} {number + 1}/{times}: {runs[name][-1].seconds:.2f} s", file=sys.stderr)
    return runs


def median(runs: Sequence[Run]) -> float:
    """The median of the runs' seconds."""
    return statistics.median(run.seconds for run in runs)


def conclude(benchmark: str, unit: str, ours: float, peers: Mapping[str, float], equal: bool) -> None:
    """Print the last line: ours against the best peer (`ratio`; of a speed, more is better), and whether the results
    agreed."""
    best = max(peers.values())
    result = {
        "benchmark": benchmark, "unit": unit, "ours": round(ours, 3),
        "peers": {name: round(value, 3) for name, value in peers.items()},
        "ratio": round(ours / best, 3), "equal": equal,
    }  # fmt: skip
    print(json.dumps(result, ensure_ascii=False))
