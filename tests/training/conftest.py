"""One thread, and an ear for the events."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fledge.core.events import Emitter, Event


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
