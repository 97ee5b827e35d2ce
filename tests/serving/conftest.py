"""A real server on a free port of this machine, with a model that has learned its answers by heart."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from fledge.inference.native import NativeEngine
from fledge.records.chat import ChatRenderer
from fledge.serving.app import create_app
from tests.inference import tiny


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The application behind uvicorn, in a thread; gives its URL."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def engine() -> Iterator[NativeEngine]:
    tokenizer = tiny.tokenizer()
    with NativeEngine(tiny.taught(), tokenizer, ChatRenderer(tokenizer)) as made:
        yield made


@pytest.fixture(scope="session")
def app(engine: NativeEngine) -> Any:
    tokenizer = tiny.tokenizer()
    base = NativeEngine(tiny.llama(), tokenizer)  # a base model: no chat template
    return create_app({"taught": engine, "base": base})


@pytest.fixture(scope="session")
def url(app: Any) -> Iterator[str]:
    with running(app) as address:
        yield address
