"""Recipes of toy stages, run for real: a store in a temporary folder, child processes and all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "core"


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stages of `toy.py`, known to this process and to its children; everything happens in a fresh folder."""
    from fledge.core import stage

    monkeypatch.setenv("FLEDGE_STAGES", "toy")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLEDGE_LANG", "en")
    monkeypatch.chdir(tmp_path)
    stage.all_stages.cache_clear()
