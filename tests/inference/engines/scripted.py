"""A server that says what it was told to say: for everything that ours never does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, Any], None]


@dataclass
class Script:
    """What was asked, and how each path is answered."""

    answers: dict[str, Answer]
    asked: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def bodies(self, path: str) -> list[Any]:
        """The bodies that came to a path."""
        return [body for where, body, _ in self.asked if where == path]


def reply(value: Any, status: int = 200, **headers: str) -> Answer:
    """JSON (or a text as it is)."""
    content = value if isinstance(value, str) else json.dumps(value)

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        data = content.encode()
        handler.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), text)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def events(*chunks: Any, done: bool = True) -> Answer:
    """A stream of events; without `done` the connection is simply closed after them."""

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        for chunk in chunks:
            data = chunk if isinstance(chunk, str) else json.dumps(chunk)
            handler.wfile.write(f"data: {data}\n\n".encode())
            handler.wfile.flush()
        if done:
            handler.wfile.write(b"data: [DONE]\n\n")

    return answer


def models(owner: str = "someone", **more: Any) -> Answer:
    """/v1/models with one model."""
    return reply({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": owner, **more}]})


@contextmanager
def scripted(**answers: Answer) -> Iterator[Script]:
    """The server; paths are written with _ for / and begin without one: `v1_models`."""
    script = Script({"/" + name.replace("_", "/"): answer for name, answer in answers.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(data) if data else None
            script.asked.append((self.path, body, dict(self.headers)))
            script.answers.get(self.path, reply({"error": "not found"}, 404))(self, body)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
