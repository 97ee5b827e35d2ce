"""The terminal answers at once: schemas, recipes and plans live without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fledge.core.stage import MODULES

HEAVY = [
    "compressed_tensors", "fastapi", "ftfy", "gguf", "huggingface_hub", "httpx", "matplotlib", "nicegui", "numpy",
    "pandas", "peft", "polars", "pyarrow", "scipy", "sklearn", "tensorboard", "tokenizers", "torch", "transformers",
    "uvicorn",
]  # fmt: skip
COMMAND = str(Path(sys.executable).parent / "fledge")


def best_of(tries: int, command: list[str]) -> float:
    """The shortest wall time of several whole processes, in seconds: what the machine can, whatever else it does."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("module", ["fledge", "fledge.cli.main", *MODULES])
def test_no_heavy_library_is_imported_before_it_is_used(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"{module} imports {done.stdout}"


def test_import_fledge_takes_less_than_three_tenths_of_a_second() -> None:
    assert best_of(7, [sys.executable, "-c", "import fledge"]) < 0.3


def test_help_takes_less_than_half_a_second() -> None:
    assert best_of(7, [COMMAND, "--help"]) < 0.5
