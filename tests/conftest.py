"""What every test may rely on: no network, English, one thread, and a home of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Set before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["FLEDGE_LANG"] = "en"
os.environ["MPLBACKEND"] = "agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _shared_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is ever written to the working folder's `.fledge`, not even by a fixture of a module or a session."""
    os.environ["FLEDGE_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts with an empty store."""
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / ".fledge"))
