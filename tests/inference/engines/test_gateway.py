"""Our server in front of another server: the same answers, the same errors with the status that a client can use."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fledge.inference.engines.remote import RemoteEngine
from fledge.inference.native import NativeEngine
from fledge.serving.app import create_app
from tests.inference.engines.scripted import events, models, reply, scripted
from tests.serving.conftest import running

CHAT = {"messages": [{"role": "user", "content": "hello 你好"}], "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def gateway(url: str) -> Iterator[str]:
    with RemoteEngine(url) as engine, running(create_app({"front": engine})) as address:
        yield address


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", CHAT),
        ("chat/completions", CHAT | {"n": 3, "temperature": 1, "seed": 4}),
        ("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
        ("completions", {"prompt": ["the", "how"], "temperature": 0, "max_tokens": 6, "logprobs": 1}),
        ("completions", {"prompt": [5, 6, 7], "temperature": 0, "prompt_logprobs": 1, "return_token_ids": True}),
        ("embeddings", {"input": ["hello", "你好"]}),
        ("embeddings", {"input": "hello", "encoding_format": "base64"}),
    ],
)
def test_what_the_front_says_is_what_the_back_says(url: str, gateway: str, path: str, body: dict[str, Any]) -> None:
    front, back = (httpx.post(f"{at}/v1/{path}", json=body, timeout=30) for at in (gateway, url))
    assert front.status_code == back.status_code == 200
    own = ("id", "created", "model")
    assert {k: v for k, v in _rounded(front.json()).items() if k not in own} == {
        k: v for k, v in _rounded(back.json()).items() if k not in own
    }


def _rounded(value: Any) -> Any:
    """JSON with its numbers to five places."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 5))


def test_a_stream_goes_through_piece_by_piece(gateway: str, url: str) -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    found = []
    for at in (gateway, url):
        with httpx.stream("POST", f"{at}/v1/chat/completions", json=body, timeout=30) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
        found.append((text, chunks[-1]["usage"]))
        assert len(chunks) > 4
    assert found[0] == found[1]


def test_a_client_that_hangs_up_frees_the_engine_behind(gateway: str, url: str) -> None:
    body = CHAT | {"stream": True, "max_tokens": 200, "ignore_eos": True}
    with httpx.stream("POST", f"{gateway}/v1/chat/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    end = time.monotonic() + 10
    for at, name in ((gateway, "front"), (url, "tiny")):
        while f'fledge_active_requests{{model="{name}"}} 0.0' not in httpx.get(f"{at}/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_tokens_are_counted_in_the_metrics(gateway: str) -> None:
    def read(kind: str) -> float:
        lines = httpx.get(f"{gateway}/metrics").text.splitlines()
        return sum(float(x.split()[-1]) for x in lines if x.startswith("fledge_tokens_total") and f'"{kind}"' in x)

    before = read("prompt"), read("completion")
    usage = httpx.post(f"{gateway}/v1/chat/completions", json=CHAT, timeout=30).json()["usage"]
    assert (read("prompt") - before[0], read("completion") - before[1]) == (
        usage["prompt_tokens"], usage["completion_tokens"]
    )  # fmt: skip


def test_tokens_of_a_text_and_back(gateway: str, engine: NativeEngine) -> None:
    ids = httpx.post(f"{gateway}/tokenize", json={"prompt": "hello 你好"}).json()["tokens"]
    assert ids == engine.encode("hello 你好")
    assert httpx.post(f"{gateway}/detokenize", json={"tokens": ids}).json() == {"prompt": "hello 你好"}
    counted = httpx.post(f"{gateway}/tokenize", json={"messages": CHAT["messages"]}).json()
    assert counted["count"] > len(ids) and counted["tokens"] is None
    wrong = httpx.post(f"{gateway}/tokenize", json={})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("answer", "status", "says"),
    [
        (reply({"error": {"message": "slow down"}}, 429, Retry_After="7"), 429, "slow down"),
        (reply({"error": {"message": "no key"}}, 401), 502, "FLEDGE_ENGINE_KEY"),
        (reply({"error": {"message": "not that"}}, 400), 400, "not that"),
        (reply({"error": {"message": "maximum context length"}}, 400), 400, "maximum context length"),
        (reply("oops", 500), 502, "oops"),
        (events("{"), 502, "cannot be read"),
    ],
)
def test_errors_behind_have_a_status_in_front(answer: Any, status: int, says: str) -> None:
    with (
        scripted(v1_models=models(), v1_chat_completions=answer) as script,
        RemoteEngine(script.url) as engine,
        running(create_app({"front": engine})) as address,
    ):
        for stream in (False, True):
            got = httpx.post(f"{address}/v1/chat/completions", json=CHAT | {"stream": stream}, timeout=30)
            assert got.status_code == status and says in got.json()["error"]["message"]
            assert got.headers.get("retry-after") == ("7" if status == 429 else None)


def test_an_engine_that_is_gone_or_silent() -> None:
    hold = threading.Event()
    with scripted(v1_models=models(), v1_chat_completions=lambda *_: hold.wait(5)) as script:  # type: ignore[dict-item]
        engine = RemoteEngine(script.url, timeout=0.2)
        with running(create_app({"front": engine})) as address:
            assert httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=30).status_code == 504
            refused = httpx.post(f"{address}/v1/chat/completions", json=CHAT | {"top_k": 5}, timeout=30)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "top_k"
            hold.set()
            engine._http.api = "http://127.0.0.1:9/v1"
            assert httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=30).status_code == 502
        engine.close()
