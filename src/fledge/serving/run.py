"""`fledge serve`: a model folder behind HTTP, until Ctrl-C."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.adapted import AdaptedEngine
from fledge.inference.opening import open_engine
from fledge.inference.prompting.tools import Tool
from fledge.serving.app import create_app


def serve(
    path: Path | str,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    device: str = "auto",
    mount: Callable[[FastAPI], None] | None = None,
    adapters: Mapping[str, Path] | None = None,
    engine: str = "native",
    tools: Mapping[str, Tool] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Serve the model folder (or URL) `path` under `name` until Ctrl-C or SIGTERM. `mount` may add pages to the
    application. Without a name, a URL's model has the name that it has there.

    `adapters`: LoRA folders on that model, each served under its own name. `engine` as `open_engine` has it.
    `tools`: what prompting techniques may use that clients ask for; None: the calculator. `options` of the engine.

    Port 0 takes a free one. Raises FledgeError when the address cannot be had, before the model is loaded.
    """
    import uvicorn

    listening = _listen(host, port)
    more = options or {}
    with listening, closing(open_engine(path, dtype, device, engine=engine, adapters=adapters, **more)) as opened:
        name = name or str(opened.model)
        adapted = {adapter: AdaptedEngine(opened, adapter) for adapter in adapters or ()}
        app = create_app({name: opened} | adapted, tools)
        if mount is not None:
            mount(app)
        # Streams that are open when one asks it to stop are given a moment, then cut.
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="on")
        _announce(name, host, listening.getsockname()[1], page=mount is not None)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # From here on the system accepts connections and holds them until the model is loaded: whoever reads the
        # announced address can use it at once.
        listening.listen(2048)
    except OSError as error:
        listening.close()
        problem = Problem(
            t("the server cannot listen on {address}", address=f"{host}:{port}"),
            found=error.strerror or str(error),
            fix=t("choose another one with --port (0 takes a free one)"),
        )
        raise FledgeError(problem) from None
    return listening


def _announce(name: str, host: str, port: int, page: bool) -> None:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{port}"
    if page:
        print(t("Chat with {name}: {url}", name=name, url=url))
    print(t("OpenAI's API: {url} (Ctrl-C stops)", url=f"{url}/v1"))
    sys.stdout.flush()
