"""A site on this machine for the crawler's tests: pages by path, traps, and a count of what was asked for."""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def html(body: str, head: str = "") -> bytes:
    """A small page, padded so that no two bodies are alike by chance of being empty."""
    return f"<!doctype html><html><head><meta charset=utf-8>{head}</head><body>{body}</body></html>".encode()


def links(*hrefs: str, text: str = "") -> bytes:
    """A page of links."""
    return html(f"<p>{text}</p>" + "".join(f'<a href="{href}">{href}</a> ' for href in hrefs))


def page(body: bytes, kind: str = "text/html; charset=utf-8", status: int = 200, **headers: str) -> Answer:
    """An answer; underscores in the names of headers stand for hyphens."""
    return status, {"Content-Type": kind} | {key.replace("_", "-"): value for key, value in headers.items()}, body


def redirect(to: str, status: int = 302) -> Answer:
    return status, {"Location": to}, b""


@dataclass
class Site:
    """`pages` maps a path (with its query) to an answer, or to a function of the handler that makes one or writes
    by itself and returns None. `fallback(path, host)` answers everything else."""

    pages: dict[str, Answer | Callable[[BaseHTTPRequestHandler], Answer | None]] = field(default_factory=dict)
    fallback: Callable[[str, str], Answer] = lambda path, host: page(b"nothing here", status=404)
    asked: Counter[str] = field(default_factory=Counter)  # by path
    urls: Counter[str] = field(default_factory=Counter)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[tuple[str, float]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serve(site: Site, tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    """The site on a port of the loopback address, until the block ends."""
    import time

    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes

        def do_GET(self) -> None:
            with lock:
                site.asked[self.path] += 1
                site.urls[f"http://{self.headers['Host']}{self.path}"] += 1
                site.headers.append(dict(self.headers))
                site.times.append((self.path, time.monotonic()))
            found = site.pages.get(self.path)
            answer = found(self) if callable(found) else found or site.fallback(self.path, self.headers["Host"])
            if answer is None:
                self.close_connection = True
                return
            status, headers, body = answer
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except (ConnectionError, TimeoutError):  # the crawler hung up: that is what several tests are about
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
