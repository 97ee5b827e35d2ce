"""A real Chromium in front of a real server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[str]:
    """The server of `taught_server.py`, in a process and a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.studio.taught_server", str(port)],
            cwd=folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        patience = time.monotonic() + 180  # it imports torch and learns its answers first
        while not _answers(address):
            assert process.poll() is None and time.monotonic() < patience, (folder / "log.txt").read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(10)
    assert "Traceback" not in (folder / "log.txt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["log.txt"], "the page must leave no files behind"


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").is_success
    except httpx.TransportError:
        return False


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page as a person with a fresh browser; nothing may go wrong in it or reach beyond the server."""
    contexts, wrong = [], []

    def opened(width: int = 1280, height: int = 800, locale: str = "en-US", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, locale=locale, **options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        inside = (url, "ws://" + url.removeprefix("http://"), "data:", "blob:")
        page.on("request", lambda r: wrong.append(f"outside: {r.url}") if not r.url.startswith(inside) else None)
        page.goto(url)
        page.wait_for_selector(".fl-example")
        page.wait_for_function("window.socket?.connected ?? window.did_handshake ?? true")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong
