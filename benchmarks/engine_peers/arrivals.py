"""Two servers under the same load: how long a reader waits for the first token.

Every request is a stream of OpenAI's /v1/completions over loopback, one connection each, spoken by hand so that the
client takes next to nothing of the processor that it measures.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

NAME = "smollm2"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def served(command: Sequence[str], port: int, variables: Mapping[str, str], patience: float = 600) -> Iterator[None]:
    """A server until the block ends. Raises RuntimeError, with what it said, when it does not come up."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env={**os.environ, **variables}, start_new_session=True
        )
        try:
            deadline = time.monotonic() + patience
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    sys.stderr.write(said.read()[-4_000:].decode(errors="replace"))
                    raise RuntimeError(f"{command[2]} serves nothing")
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # itself and the processes that it started
                process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def capacity(port: int, requests: Sequence[Any], **options: Any) -> float:
    """Requests a second when all come at once. `options` are fields that only this server knows."""
    started = time.perf_counter()
    asyncio.run(_all(port, requests, [0.0] * len(requests), options))
    return len(requests) / (time.perf_counter() - started)


def first_tokens(port: int, requests: Sequence[Any], rate: float, seed: int, **options: Any) -> list[float]:
    """Seconds from each request to its first token, under Poisson arrivals of `rate` requests a second."""
    draw, at, times = random.Random(seed), 0.0, []
    for _ in requests:
        at += draw.expovariate(rate)
        times.append(at)
    return asyncio.run(_all(port, requests, times, options))


async def _all(port: int, requests: Sequence[Any], times: Sequence[float], options: Mapping[str, Any]) -> list[float]:
    started = time.perf_counter()

    async def later(request: Any, at: float) -> float:
        await asyncio.sleep(at - (time.perf_counter() - started))
        return await _ask(port, *request, options)

    return list(await asyncio.gather(*map(later, requests, times)))


async def _ask(port: int, prompt: list[int], length: int, options: Mapping[str, Any]) -> float:
    """Seconds to the first token of one stream, which is read to its end and must hold `length` tokens."""
    body = json.dumps({
        "model": NAME, "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **options,
    }).encode()  # fmt: skip
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    started, first, written = time.perf_counter(), 0.0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read()).decode(errors="replace"))
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event["choices"] and not first:
            first = time.perf_counter() - started
        written = (event.get("usage") or {}).get("completion_tokens", written)
    writer.close()
    if written != length:
        raise RuntimeError(f"asked for {length} tokens, got {written}")
    return first


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
