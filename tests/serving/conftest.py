"""A real server on a free port of this machine, with a model that has learned its answers by heart."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
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


@contextmanager
def posted(url: str, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection on which a request was sent; leaving the block hangs up."""
    host, port = url.removeprefix("http://").split(":")
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + text)
        yield connection


def metric(url: str, name: str, **labels: str) -> float:
    """The value of one line of /metrics; 0 where there is none yet."""
    wanted = "".join(sorted(f'{key}="{value}"' for key, value in labels.items()))
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        head, _, value = line.rpartition(" ")
        if head.partition("{")[0] == name and "".join(sorted(head.partition("{")[2].rstrip("}").split(","))) == wanted:
            return float(value)
    return 0.0


def wait_for(condition: Any, seconds: float = 60) -> None:
    """Until it is so. The seconds are for what never happens, not for a machine that has much to do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


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
