"""HTTP to another engine: one JSON answer, or a stream of them; every failure becomes one of our errors.

Only what fails before the first byte of a reply is tried again, three times in all: after that the server may have
begun to work, and a second request would be another answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from typing import Any

import httpx

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import PromptTooLong
from fledge.inference.engines.errors import Busy, EngineError, Failed, NotAllowed, Refused, TimedOut, Unreachable
from fledge.inference.engines.wire import unreadable

PAUSES = (0.2, 0.8)
"""seconds before the second and the third try"""
_AGAIN = (httpx.ConnectError, httpx.ConnectTimeout, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
_TOO_LONG = ("context_length_exceeded", "exceed_context_size", "maximum context length", "context size")


class Transport:
    """Clients for one server: a blocking one for short questions, one of an event loop for answers."""

    def __init__(self, url: str, key: str, timeout: float, concurrency: int) -> None:
        """`url`: with or without /v1. `timeout`: seconds of silence that are borne."""
        url = url.rstrip("/")
        self.root, self.api = url.removesuffix("/v1"), url if url.endswith("/v1") else f"{url}/v1"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=max(concurrency, 16), max_keepalive_connections=concurrency)
        times = httpx.Timeout(timeout, connect=10.0)
        self._options: dict[str, Any] = {"headers": headers, "limits": limits, "timeout": times}
        self._client = httpx.Client(**self._options)
        self._streams: httpx.AsyncClient | None = None

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON at a path below /v1, or, where it begins with "/", at the server's root. Raises EngineError."""
        url = self._url(path)
        for pause in (*PAUSES, None):
            try:
                response = self._client.request(method, url, json=body)
                break
            except httpx.HTTPError as error:
                if pause is None or not isinstance(error, _AGAIN):
                    raise failure(error, url) from None
            time.sleep(pause)
        return _json(response.status_code, response.headers, response.content, url)

    def look(self, path: str) -> Any:
        """The JSON at a path, None where there is nothing of the kind."""
        try:
            return self.ask("GET", path)
        except EngineError:
            return None

    async def replies(self, path: str, body: Any) -> AsyncGenerator[Mapping[str, Any], None]:
        """The JSON objects of a stream, or the one of a whole reply. Closing the iterator hangs up."""
        if self._streams is None:
            self._streams = httpx.AsyncClient(**self._options)
        url = self._url(path)
        for pause in (*PAUSES, None):
            begun = False
            try:
                async with self._streams.stream("POST", url, json=body) as response:
                    begun = True
                    if "event-stream" not in response.headers.get("content-type", "") or response.status_code != 200:
                        yield _json(response.status_code, response.headers, await response.aread(), url)
                        return
                    async with aclosing(response.aiter_lines()) as lines, aclosing(_events(lines)) as found:
                        async for data in found:
                            yield _event(data, url)
                return
            except httpx.HTTPError as error:
                if begun or pause is None or not isinstance(error, _AGAIN):
                    raise failure(error, url, begun) from None
            await asyncio.sleep(pause)

    def close(self) -> None:
        """Let go of the blocking connections."""
        self._client.close()

    async def aclose(self) -> None:
        """Let go of those of the event loop."""
        if self._streams is not None:
            await self._streams.aclose()

    def _url(self, path: str) -> str:
        return f"{self.root}{path}" if path.startswith("/") else f"{self.api}/{path}"


async def _events(lines: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The data of server-sent events, up to `[DONE]`."""
    data: list[str] = []
    async for line in lines:
        name, _, value = line.partition(":")
        if name in ("data", "error"):  # llama.cpp had a field "error" of its own
            data.append(value.removeprefix(" "))
        elif not line and data:
            if data == ["[DONE]"]:
                return
            yield "\n".join(data)
            data = []
    if data and data != ["[DONE]"]:
        yield "\n".join(data)


def _event(data: str, url: str) -> Mapping[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise unreadable(data, error) from None
    if not isinstance(value, dict):
        raise unreadable(data, t("it is not a JSON object"))
    if "error" in value or ("choices" not in value and "message" in value and "code" in value):
        raise refusal(_status(value), {}, data, url)
    return value


def _status(value: Mapping[str, Any]) -> int:
    """The status that an error within a stream would have had."""
    inner = value.get("error", value)
    code = inner.get("code") if isinstance(inner, dict) else None
    return code if isinstance(code, int) and code >= 400 else 500


def _json(status: int, headers: Mapping[str, str], content: bytes, url: str) -> Any:
    text = content.decode("utf-8", "replace")
    if status != 200:
        raise refusal(status, headers, text, url)
    try:
        return json.loads(text)
    except ValueError as error:
        raise unreadable(text, error) from None


def refusal(status: int, headers: Mapping[str, str], text: str, url: str) -> FledgeError:
    """The error for a reply that is none."""
    said, code = _said(text)
    if status in (400, 413, 422, 500) and any(sign in f"{code} {said}".lower() for sign in _TOO_LONG):
        return PromptTooLong(Problem(t("the prompt is longer than the model's context"), url, found=said))
    found = f"{status}: {said}" if said else str(status)
    if status in (401, 403):
        fix = t("put the key into FLEDGE_ENGINE_KEY")
        return NotAllowed(Problem(t("the server wants another API key"), url, found, fix=fix))
    if status in (429, 503):
        busy = Busy(Problem(t("the server has too much to do"), url, found, fix=_later(headers)))
        with suppress(ValueError):
            busy.retry_after = float(headers.get("retry-after", ""))
        return busy
    if status == 501:
        return Refused(Problem(t("the server does not do this"), url, found))
    if status >= 500:
        return Failed(Problem(t("the server made a mistake"), url, found))
    if 300 <= status < 400:
        where = headers.get("location", "")
        return Refused(Problem(t("the server sends one elsewhere"), url, where, fix=t("give that address")))
    return Refused(Problem(t("the server refuses the request"), url, found))


def _later(headers: Mapping[str, str]) -> str:
    seconds = headers.get("retry-after", "")
    return t("try again after {seconds} s", seconds=seconds) if seconds else ""


def _said(text: str) -> tuple[str, str]:
    """The message and the code in a server's error: OpenAI's object, or one of the shapes in use beside it."""
    try:
        value = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:300], ""
    inner = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(inner, dict):
        return str(inner)[:300], ""
    message = next((inner[key] for key in ("message", "detail", "error") if inner.get(key)), text)
    return str(message)[:2000], str(inner.get("code") or inner.get("type") or "")


def failure(error: httpx.HTTPError, url: str, begun: bool = False) -> EngineError:
    """The error for a connection that failed. `begun`: within a reply."""
    found = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError | httpx.UnsupportedProtocol):
        fix = t("start the server, or correct the address")
        return Unreachable(Problem(t("nobody answers at this address"), url, found, fix=fix))
    if isinstance(error, httpx.TimeoutException):
        return TimedOut(Problem(t("the server was silent for too long"), url, found))
    if begun:
        return Failed(Problem(t("the server broke the answer off"), url, found))
    return Unreachable(Problem(t("the connection to the server broke"), url, found))
