"""One request: to checked addresses only, within limits of bytes and time, its bytes kept as they came.

`httpcore` (what `httpx` sends with) is used without the layers above it: no cookies, no redirects followed, nothing
unpacked behind our back. A name is resolved once, its addresses are checked and one of *them* is connected to.
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpcore
import httpx

from fledge.core.addresses import RefusedAddress, UnknownHost, refuse_private
from fledge.data.crawl.page import header
from fledge.data.crawl.urls import split

ERROR_BYTES = 262_144  # of a page that says 404, and the like, no more is read
SNIFF_BYTES = 2_048
Headers = Sequence[tuple[str, str]]
Refuse = Callable[[int, Headers, bytes], str]
"""(status, headers, the first bytes) → why the rest is not wanted, or nothing."""


class FetchFailed(Exception):
    """No whole answer came. `again` says whether another try may help; reasons are English, for the rejected rows."""

    def __init__(self, reason: str, value: str = "", again: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.value, self.again = reason, value, again


@dataclass(frozen=True)
class Response:
    """What a server answered. `wire` are the body's bytes as sent (without chunking), `body` the same unpacked."""

    url: str
    status: int
    phrase: str
    version: str
    headers: Headers
    wire: bytes
    body: bytes
    sent: Headers
    peer: str  # IP address
    date: datetime
    refused: str = ""  # why reading stopped, if it did
    whole: bool = True

    @property
    def location(self) -> str:
        """Where a redirect leads, as written; empty for everything else. Some servers write it in UTF-8."""
        value = header(self.headers, "location") if 300 <= self.status < 400 else ""
        try:
            return value.encode("latin-1").decode("utf-8")
        except UnicodeDecodeError:
            return value

    @property
    def retry_after(self) -> float:
        """Seconds the server asks to wait; 0 where it says nothing of it."""
        value = header(self.headers, "retry-after").strip()
        if value.isdecimal():
            return float(value)
        try:
            until = parsedate_to_datetime(value)
        except (ValueError, TypeError, LookupError, OverflowError):
            return 0.0
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return max(0.0, (until - datetime.now(UTC)).total_seconds())


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to the addresses that `refuse_private` has checked; the name is still what TLS verifies."""

    def __init__(self, allow_private: bool) -> None:
        self._allow, self._inner = allow_private, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await asyncio.to_thread(refuse_private, host, self._allow)
        for number, address in enumerate(addresses, 1):
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if number == len(addresses):
                    raise
        raise httpcore.ConnectError(f"{host} has no address")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class Unpacker:
    """A body unpacked as it comes (gzip or deflate), no more than `most` bytes of it: a few packed kilobytes may
    hold gigabytes."""

    def __init__(self, coding: str, most: int) -> None:
        self.most, self.size = most, 0
        self._pieces: list[bytes] = []
        self._coding = coding.strip().lower()
        self._stream: Any = None
        if self._coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise FetchFailed("packed in a way not asked for", self._coding, again=False)

    @property
    def full(self) -> bool:
        """Whether more came than is allowed."""
        return self.size > self.most

    @property
    def unfinished(self) -> bool:
        """Whether the packed stream has not come to its end."""
        return self._stream is not None and not self._stream.eof

    def feed(self, data: bytes) -> None:
        """Take the next bytes from the wire."""
        if self._coding in ("", "identity"):
            self._keep(data)
            return
        while data and not self.full:
            if self._stream is None or self._stream.eof:  # gzip streams may follow one another
                raw = self._coding == "deflate" and data[0] & 0x0F != 8  # some send deflate without zlib's frame
                self._stream = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
            try:
                self._keep(self._stream.decompress(data, self.most - self.size + 1))
            except zlib.error as error:
                raise FetchFailed("cannot be unpacked", str(error), again=False) from None
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail

    def _keep(self, data: bytes) -> None:
        self._pieces.append(data)
        self.size += len(data)

    def start(self) -> bytes:
        """The first bytes of what has come so far."""
        return b"".join(self._pieces[:8])[:SNIFF_BYTES]

    def body(self) -> bytes:
        """Everything that came."""
        return b"".join(self._pieces)


def unpack(wire: bytes, coding: str, most: int) -> bytes:
    """A whole body unpacked, cut off behind `most` bytes."""
    unpacker = Unpacker(coding, most)
    unpacker.feed(wire)
    return unpacker.body()[:most]


class Fetcher:
    """Requests over one pool of connections. An async context manager."""

    def __init__(self, user_agent: str, timeout: float, concurrency: int, allow_private: bool) -> None:
        self.timeout = timeout
        self._agent = user_agent
        self._pool = httpcore.AsyncConnectionPool(
            httpx.create_ssl_context(),  # certifi's authorities, or those that SSL_CERT_FILE names
            max_connections=concurrency + 8, max_keepalive_connections=concurrency, keepalive_expiry=15,
            network_backend=CheckedBackend(allow_private),
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._pool.aclose()

    async def get(self, url: str, most_bytes: int, refuse: Refuse | None = None) -> Response:
        """GET a canonical URL. Raises `FetchFailed`; `timeout` is for all of it, however slowly the bytes drip."""
        try:
            async with asyncio.timeout(self.timeout):
                return await self._get(url, most_bytes, refuse)
        except RefusedAddress as error:
            raise FetchFailed("a private address", error.problems[0].found, again=False) from None
        except UnknownHost as error:
            raise FetchFailed("the host cannot be found", error.problems[0].found) from None
        except (TimeoutError, httpcore.TimeoutException):
            raise FetchFailed("no whole answer in time", f"{self.timeout:g} s") from None
        except httpcore.ConnectError as error:
            tls = isinstance(error.__context__, ssl.SSLError)  # a certificate does not get better by asking again
            reason = "no secure connection" if tls else "the connection failed"
            raise FetchFailed(reason, str(error)[:200], again=not tls) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError, ValueError) as error:
            raise FetchFailed("the connection failed", f"{type(error).__name__}: {error}"[:200]) from None

    async def _get(self, url: str, most_bytes: int, refuse: Refuse | None) -> Response:
        place, date = split(url), datetime.now(UTC)
        sent = [
            ("Host", place.origin.partition("//")[2]),
            ("User-Agent", self._agent),
            ("Accept", "text/html,application/xhtml+xml;q=0.9,text/plain;q=0.8,*/*;q=0.1"),
            ("Accept-Encoding", "gzip, deflate"),
        ]
        target = httpcore.URL(
            scheme=place.scheme.encode(), host=place.host.encode(), port=place.port, target=place.target.encode("ascii")
        )
        limits = dict.fromkeys(("connect", "read", "write", "pool"), self.timeout)
        async with self._pool.stream("GET", target, headers=sent, extensions={"timeout": limits}) as answer:
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in answer.headers]
            good = answer.status in (200, 203)
            wire, unpacker, refused = await _read(
                answer, headers, most_bytes if good else ERROR_BYTES, refuse if good else None
            )
            stream = answer.extensions.get("network_stream")
            peer = stream.get_extra_info("server_addr") if stream is not None else None
            return Response(
                url, answer.status, answer.extensions.get("reason_phrase", b"").decode("latin-1"),
                answer.extensions.get("http_version", b"HTTP/1.1").decode("latin-1"), headers, wire, unpacker.body(),
                sent, str(peer[0]) if peer else "", date, refused, whole=not refused and not unpacker.full,
            )  # fmt: skip


async def _read(
    answer: httpcore.Response, headers: Headers, most: int, refuse: Refuse | None
) -> tuple[bytes, Unpacker, str]:
    """The body as far as it is wanted: what came over the wire, what it unpacks to, and why reading stopped."""
    coding = header(headers, "content-encoding") if answer.status in (200, 203) else ""  # of an error no one reads
    unpacker, wire, asked = Unpacker(coding, most), bytearray(), refuse is None
    announced = header(headers, "content-length")
    if refuse is not None and announced.isdecimal() and float(announced) > most:
        return b"", unpacker, f"too large: > {most} bytes"
    async for piece in answer.aiter_stream():
        wire += piece
        unpacker.feed(piece)
        if unpacker.full or len(wire) > most:
            return bytes(wire), unpacker, f"too large: > {most} bytes"
        if refuse is not None and not asked and unpacker.size >= 512:
            asked = True
            if reason := refuse(answer.status, headers, unpacker.start()):
                return bytes(wire), unpacker, reason
    if unpacker.unfinished:
        raise FetchFailed("cannot be unpacked", "it ends too early")
    if refuse is not None and not asked:
        return bytes(wire), unpacker, refuse(answer.status, headers, unpacker.start())
    return bytes(wire), unpacker, ""
