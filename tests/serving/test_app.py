"""What the official client does not show: raw errors, metrics, clients that hang up, engines that fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from fledge.core.errors import FledgeError
from fledge.inference.native import NativeEngine
from fledge.serving.app import create_app
from fledge.serving.run import serve
from tests.inference import tiny
from tests.serving.conftest import metric, posted, running, wait_for

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


def test_health(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "models": ["taught", "base"]}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ("{", None, None),
        ("", None, "missing_required_parameter"),
        ("[]", None, "invalid_value"),
        ('{"mesages": []}', "mesages", "unknown_parameter"),
        ("{}", "messages", "missing_required_parameter"),
        ('{"messages": [{"role": "user", "content": 5}]}', "messages.0.content", "invalid_value"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', None, None),
    ],
)
def test_bodies_that_are_no_request(url: str, body: str, param: str | None, code: str | None) -> None:
    reply = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error" and error["message"]
    assert "Traceback" not in reply.text
    if code:
        assert (error["param"], error["code"]) == (param, code)


def test_addresses_and_methods_that_are_not_there(url: str) -> None:
    assert httpx.get(f"{url}/v1/nothing").status_code == 404
    assert "error" in httpx.get(f"{url}/v1/nothing").json()
    assert "error" in httpx.get(f"{url}/v1/chat/completions").json()
    assert httpx.get(f"{url}/v1/models/nobody").json()["error"]["code"] == "model_not_found"


def test_the_first_model_answers_when_none_is_named(url: str) -> None:
    reply = httpx.post(f"{url}/v1/chat/completions", json=HELLO).json()
    assert reply["model"] == "taught" and reply["choices"][0]["message"]["content"] == tiny.TAUGHT["Hello"]


def test_the_bytes_of_a_stream(url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=HELLO | {"stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in events) and events[-1] == "data: [DONE]"
    assert all(json.loads(line[6:])["object"] == "chat.completion.chunk" for line in events[:-1])


def test_metrics_count_what_happened(url: str) -> None:
    names = ("prompt", "completion")
    before = [metric(url, "fledge_tokens_total", model="taught", kind=kind) for kind in names]
    ok = metric(url, "fledge_requests_total", model="taught", outcome="ok")
    first = metric(url, "fledge_time_to_first_token_seconds_count", model="taught")
    usage = httpx.post(f"{url}/v1/chat/completions", json=HELLO).json()["usage"]
    after = [metric(url, "fledge_tokens_total", model="taught", kind=kind) for kind in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [usage["prompt_tokens"], usage["completion_tokens"]]
    assert metric(url, "fledge_requests_total", model="taught", outcome="ok") == ok + 1
    assert metric(url, "fledge_time_to_first_token_seconds_count", model="taught") == first + 1
    assert metric(url, "fledge_active_requests", model="taught") == 0


def test_metrics_show_the_engine_from_within(url: str, engine: NativeEngine) -> None:
    long = {"messages": [{"role": "user", "content": "Hello " * 30}], "temperature": 0, "max_tokens": 2}
    first = httpx.post(f"{url}/v1/chat/completions", json=long).json()
    again = httpx.post(f"{url}/v1/chat/completions", json=long).json()
    assert first["choices"] == again["choices"]
    wait_for(lambda: metric(url, "fledge_engine_blocks_used", model="taught") == 0)
    hits = metric(url, "fledge_engine_prefix_hit_tokens_total", model="taught")
    read = metric(url, "fledge_engine_prompt_tokens_total", model="taught")
    assert first["usage"]["prompt_tokens"] - 17 <= hits < read, "all of it but for the last block"
    assert metric(url, "fledge_engine_blocks_cached", model="taught") == engine.statistics().blocks_cached > 0
    assert metric(url, "fledge_engine_running", model="base") == metric(url, "fledge_engine_waiting", model="base") == 0


@dataclass
class Held:
    """A server whose model computes three steps and is then held back until it is let go."""

    url: str
    engine: NativeEngine
    go_on: threading.Event
    steps: list[None]


@pytest.fixture
def held() -> Iterator[Held]:
    steps: list[None] = []
    go_on = threading.Event()

    def count(*_: Any) -> None:
        steps.append(None)
        assert len(steps) <= 3 or go_on.wait(60)

    model = tiny.llama()
    model.register_forward_pre_hook(count)
    with NativeEngine(model, tiny.tokenizer()) as engine, running(create_app({"held": engine})) as url:
        steps.clear()  # the engine's own question, what each layer keeps
        yield Held(url, engine, go_on, steps)
        go_on.set()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_the_work(held: Held, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 200, "stream": stream, "logprobs": 0}
    with posted(held.url, "/v1/completions", body) as connection:
        wait_for(lambda: len(held.steps) == 4)
        assert metric(held.url, "fledge_active_requests", model="held") == 1
        if stream:
            assert b"200 OK" in connection.recv(4096)
    wait_for(lambda: metric(held.url, "fledge_active_requests", model="held") == 0)
    assert metric(held.url, "fledge_requests_total", model="held", outcome="cancelled") == 1
    held.go_on.set()
    wait_for(lambda: not held.engine._call(lambda: bool(held.engine._scheduler)))
    assert len(held.steps) == 4, "the step that was being computed is the last one"
    assert metric(held.url, "fledge_tokens_total", model="held", kind="completion") <= 3


def test_an_engine_that_fails_midway(url: str) -> None:
    model = tiny.llama()
    calls = iter(range(-1, 100))  # the engine's own question, what each layer keeps, comes first

    def fail_later(module: Any, inputs: Any, output: Any) -> Any:
        if next(calls) in (0, 4):
            output.logits.fill_(float("nan"))
        return output

    model.register_forward_hook(fail_later)
    with NativeEngine(model, tiny.tokenizer()) as engine, running(create_app({"weak": engine})) as weak:
        ask = {"prompt": "a", "max_tokens": 30}
        reply = httpx.post(f"{weak}/v1/completions", json=ask)
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
        with httpx.stream("POST", f"{weak}/v1/completions", json=ask | {"stream": True, "logprobs": 0}) as stream:
            events = [line for line in stream.iter_lines() if line]
        assert "error" in json.loads(events[-1][6:]) and 1 <= len(events) <= 5
        assert httpx.post(f"{weak}/v1/completions", json=ask).status_code == 200
        assert metric(weak, "fledge_requests_total", model="weak", outcome="error") == 2


def test_a_taken_port_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(FledgeError, match="cannot listen"):
        serve(tmp_path / "no model here", "x", port=other.getsockname()[1])


def test_the_command_serves_and_stops_cleanly(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", tiny.llama())
    code = f"from pathlib import Path; from fledge.serving.run import serve; serve(Path({str(folder)!r}), 'm', port=0)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FLEDGE_LANG": "en"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split("API: ")[1].split()[0]
        assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "m"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors and "terminate" not in errors
