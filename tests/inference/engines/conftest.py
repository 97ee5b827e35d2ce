"""Our own server on a free port with a tiny random model, and an engine at the other end of its URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fledge.inference.engines.remote import RemoteEngine
from fledge.serving.app import create_app
from tests.inference import tiny
from tests.serving.conftest import running


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    return tiny.save(tmp_path_factory.mktemp("engines") / "tiny", model)


@pytest.fixture(scope="session")
def url(engine: Any) -> Iterator[str]:
    with running(create_app({"tiny": engine})) as address:
        yield address


@pytest.fixture(scope="session")
def remote(url: str) -> Iterator[RemoteEngine]:
    with RemoteEngine(url) as made:
        yield made


@pytest.fixture(scope="session")
def graph_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where graphs are kept during these tests: each is written once."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("FLEDGE_HOME", str(home))
        yield home
