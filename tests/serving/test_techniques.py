"""Prompting techniques at the chat endpoint, with the official client and with a model that has learned its answers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest

from fledge.inference.native import NativeEngine
from fledge.inference.prompting.tools import Calculator, Search
from fledge.records.chat import ChatRenderer
from fledge.serving.app import create_app
from fledge.serving.techniques import Stripped
from tests.inference import tiny
from tests.serving.conftest import metric, posted, running, wait_for

VOTE = {"use": "self_consistency", "samples": 3, "temperature": 0.001, "over": "direct"}


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, technique: Any, text: str = "你好", **more: Any) -> Any:
    return client.chat.completions.create(
        model="taught", messages=[{"role": "user", "content": text}], extra_body={"technique": technique}, **more
    )


def test_the_answer_with_its_trace(client: openai.OpenAI) -> None:
    reply = ask(client, VOTE, seed=1)
    told = reply.model_extra["technique"]
    assert reply.choices[0].message.content == tiny.TAUGHT["你好"] == told["text"]
    assert told["use"] == "self_consistency" and reply.choices[0].finish_reason == "stop"
    assert [step["role"] for step in told["trace"]] == ["answer"] * 3 + ["vote"]
    assert [step.get("branch") for step in told["trace"]] == ["sample 1", "sample 2", "sample 3", None]
    assert reply.usage.prompt_tokens == sum(step.get("prompt_tokens", 0) for step in told["trace"]) > 0
    assert reply.usage.completion_tokens == sum(step.get("completion_tokens", 0) for step in told["trace"])
    once = client.chat.completions.create(
        model="taught", messages=[{"role": "user", "content": "你好"}], temperature=0
    ).usage  # fmt: skip
    assert once is not None and reply.usage.completion_tokens == 3 * once.completion_tokens


def test_a_stream_brings_the_steps_and_then_the_answer(client: openai.OpenAI) -> None:
    chunks = list(ask(client, VOTE, stream=True, seed=1, stream_options={"include_usage": True}))
    steps = [
        chunk.model_extra["technique"]["trace"][0]
        for chunk in chunks
        if "trace" in chunk.model_extra.get("technique", {})
    ]
    assert [step["role"] for step in steps] == ["answer"] * 3 + ["vote"]
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert texts == [tiny.TAUGHT["你好"]]
    last = [chunk for chunk in chunks if chunk.choices][-1]
    assert last.choices[0].finish_reason == "stop" and last.model_extra["technique"]["text"] == tiny.TAUGHT["你好"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == sum(step.get("completion_tokens", 0) for step in steps)


ROLE = {"use": "role", "role": "a friend", "over": {"use": "template", "text": "Say: {question}"}}


@pytest.mark.parametrize("technique", ["direct", ROLE], ids=["direct", "role over template"])
def test_where_the_models_words_are_the_answer_they_come_as_they_are_written(
    client: openai.OpenAI, technique: Any
) -> None:
    whole = ask(client, technique, "你好", temperature=0, max_tokens=30)
    chunks = list(ask(client, technique, "你好", temperature=0, max_tokens=30, stream=True))
    told = [chunk.model_extra.get("technique", {}) for chunk in chunks]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == whole.choices[0].message.content == told[-1]["text"] and sum(map(bool, texts)) > 3
    [step] = [place for place, what in enumerate(told) if "trace" in what]
    assert not any(texts[step:]) and chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert told[step]["trace"] == whole.model_extra["technique"]["trace"]


def test_white_space_at_the_ends_is_no_part_of_an_answer() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices(" \n\u3000a你", k=rng.randint(0, 12)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=4))
        stripped = Stripped()
        given = [stripped.add(text[a:b]) for a, b in pairwise([0, *cuts, len(text)])]
        assert "".join(given) == stripped.text == text.strip()


def test_steps_come_while_the_next_ones_are_written() -> None:
    model = tiny.llama()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    tokenizer = tiny.tokenizer()
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "technique": "cot",
        "stream": True,
        "max_tokens": 20,
        "seed": 1,
    }
    with (
        NativeEngine(model, tokenizer, ChatRenderer(tokenizer)) as engine,
        running(create_app({"slow": engine})) as url,
    ):
        times = []
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                if '"trace"' in line:
                    times.append(time.monotonic())
        assert len(times) == 2 and times[1] - times[0] > 0.1


@pytest.mark.parametrize(
    ("technique", "more", "what"),
    [
        ("cott", {}, "did you mean"),
        ({"use": "cot", "anser": 1}, {}, "anser"),
        ({"use": "self_consistency", "samples": 1000}, {}, "64"),
        ("cot", {"n": 2}, "does not go with a technique"),
        ("cot", {"logprobs": True}, "does not go with a technique"),
        ("cot", {"response_format": {"type": "json_object"}}, "use the technique format"),
        ({"use": "react", "tools": ["python"]}, {}, 'no tool "python"'),
        ({"use": "selected_shots", "pool": "/etc/passwd"}, {}, "pool cannot be set by a client"),
        ({"use": "cot", "over": {"use": "retrieval", "index": "/secret"}}, {}, "index cannot be set"),
        ({"use": "reflexion", "pattern": "(a+)+b"}, {}, "pattern cannot be set"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(client: openai.OpenAI, technique: Any, more: dict[str, Any], what: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=what) as caught:
        ask(client, technique, stream=stream, **more)
    assert "Traceback" not in str(caught.value)


def test_a_step_that_fails_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="step answer of cot") as caught:
        ask(client, "cot", text="long " * 900)
    assert caught.value.code == "context_length_exceeded"


def test_the_operators_tools(engine: NativeEngine) -> None:
    class Shelf:
        def search(self, query: str, k: int) -> list[str]:
            return ["泰山海拔1532.7米。"]

    tools = {"calculator": Calculator(), "search": Search(Shelf())}
    body = {
        "messages": [{"role": "user", "content": "你好"}], "max_tokens": 8, "temperature": 0,
        "technique": {"use": "react", "tools": ["search"], "steps": 1},
    }  # fmt: skip
    with running(create_app({"taught": engine}, tools)) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert [step["role"] for step in reply["technique"]["trace"]] == ["act", "tool", "answer"]
        assert reply["choices"][0]["finish_reason"] in ("stop", "length")


def test_metrics_count_all_steps_as_one_request(client: openai.OpenAI, url: str) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and 'model="taught"' in line
        )

    ok, tokens = value('fledge_requests_total{model="taught",outcome="ok"'), value("fledge_tokens_total")
    usage = ask(client, VOTE, seed=2).usage
    assert value('fledge_requests_total{model="taught",outcome="ok"') == ok + 1
    assert value("fledge_tokens_total") == tokens + usage.total_tokens and value("fledge_active_requests") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_the_work(stream: bool) -> None:
    calls = []
    model = tiny.llama(max_position_embeddings=4096)
    model.register_forward_pre_hook(lambda *_: (calls.append(1), time.sleep(0.02))[1])
    tokenizer = tiny.tokenizer()
    bias = {str(tokenizer.convert_tokens_to_ids("<|im_end|>")): -1000.0}
    body = {"messages": [{"role": "user", "content": "Hi"}], "technique": "cot", "stream": stream, "max_tokens": 2000,
            "logit_bias": bias}  # fmt: skip
    with (
        NativeEngine(model, tokenizer, ChatRenderer(tokenizer)) as engine,
        running(create_app({"slow": engine})) as url,
    ):
        with posted(url, "/v1/chat/completions", body):
            wait_for(lambda: len(calls) > 3)
        wait_for(lambda: metric(url, "fledge_requests_total", model="slow", outcome="cancelled") == 1)
        wait_for(lambda: not engine._call(lambda: bool(engine._scheduler)))
        before = len(calls)
        time.sleep(0.3)
        assert len(calls) == before < 2000, "neither goes this step on nor does the next one begin"
