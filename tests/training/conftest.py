"""One thread, and an ear for the events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.core.artifact import Artifact
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.stage import Execution


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def heard() -> list[Event]:
    """Every event of the test."""
    return []


@pytest.fixture
def events(heard: list[Event]) -> Emitter:
    return Emitter("test", 0, heard.append)


@pytest.fixture
def run(
    world: dict[str, Artifact], tmp_path: Path, heard: list[Event], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Carries out a stage on the module's `world`: artifacts by the names that references have."""
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))

    def carry_out(stage: Any, name: str = "a", **execution: Any) -> Any:
        folder = tmp_path / name
        (folder / "out").mkdir(parents=True, exist_ok=True)
        (folder / "work").mkdir(exist_ok=True)
        job = Job(
            name=name, out=folder / "out", work=folder / "work", seed=0, execution=Execution(**execution),
            events=Emitter(name, 0, heard.append), inputs=world,
        )  # fmt: skip
        return stage.run(job)

    return carry_out
