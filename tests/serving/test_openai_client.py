"""The official client works unchanged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from fledge.inference.native import NativeEngine
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Message
from tests.inference import tiny

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["taught", "base"]
    assert client.models.retrieve("taught").owned_by == "fledge"


@pytest.mark.parametrize("ask", ["Hello", "你好"])
def test_a_chat(client: openai.OpenAI, ask: str) -> None:
    reply = client.chat.completions.create(model="taught", messages=[{"role": "user", "content": ask}], temperature=0)
    assert reply.choices[0].message.content == tiny.TAUGHT[ask]
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    prompt = ChatRenderer(tiny.tokenizer()).render((Message("user", ask),), add_generation_prompt=True).ids
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len(tiny.tokenizer().encode(tiny.TAUGHT[ask])) + 1  # the end of the turn
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="taught", messages=[{"role": "user", "content": "你好"}], temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == tiny.TAUGHT["你好"]
    assert len([text for text in texts if text]) > 10 and not any("\ufffd" in text for text in texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_parts_developers_and_limits(client: openai.OpenAI) -> None:
    parts: list[Any] = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    reply = client.chat.completions.create(
        model="taught", messages=[{"role": "user", "content": parts}], temperature=0, max_completion_tokens=3, user="u"
    )
    assert tiny.TAUGHT["Hello"].startswith(reply.choices[0].message.content or "?")
    assert reply.choices[0].finish_reason == "length" and reply.usage and reply.usage.completion_tokens == 3
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert client.chat.completions.create(model="taught", messages=messages, max_tokens=2).choices


def test_several_answers_with_a_seed_and_stop(client: openai.OpenAI) -> None:
    options: dict[str, Any] = dict(model="taught", messages=HELLO, temperature=3.0, n=3, seed=5, max_tokens=20)
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in first.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    stopped = client.chat.completions.create(model="taught", messages=HELLO, temperature=0, stop=["help"])
    assert stopped.choices[0].message.content == "Hello! How can I "
    assert stopped.choices[0].finish_reason == "stop"


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="taught", messages=HELLO, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4
    )
    assert reply.choices[0].logprobs is not None
    rows = reply.choices[0].logprobs.content
    assert rows is not None and len(rows) == 4
    assert "".join(row.token for row in rows) == reply.choices[0].message.content
    for row in rows:
        assert row.bytes == list(row.token.encode()) and len(row.top_logprobs) == 3
        assert row.top_logprobs[0].token == row.token and row.logprob == row.top_logprobs[0].logprob <= 0


def test_plain_completions(client: openai.OpenAI, engine: NativeEngine) -> None:
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = tiny.tokenizer().encode(prompt)  # control tokens, since ids are taken as they are
    reply = client.completions.create(model="taught", prompt=ids, temperature=0, max_tokens=6, logprobs=2)
    assert tiny.TAUGHT["Hello"].startswith(reply.choices[0].text)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == reply.choices[0].text and logprobs.text_offset[0] == 0
    assert logprobs.top_logprobs is not None and len(logprobs.top_logprobs[0]) == 2
    several = client.completions.create(model="base", prompt=["a", "b"], n=2, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage and several.usage.completion_tokens == 4 * 16  # OpenAI's default length
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(model="base", prompt=["a", "b"], n=2, seed=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in several.choices]


def test_answers_that_have_to_be_json(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"城市": {"enum": ["北京", "Oslo"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["城市", "n"],
        "additionalProperties": False,
    }
    wrapped: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    for options in ({"response_format": wrapped}, {"extra_body": {"guided_json": schema}}):
        reply = client.chat.completions.create(model="taught", messages=HELLO, seed=1, n=2, **options)
        for choice in reply.choices:
            value = json.loads(choice.message.content or "")
            assert set(value) == {"城市", "n"} and value["城市"] in ("北京", "Oslo") and 0 <= value["n"] <= 9
    several: list[Any] = [{"guided_regex": "[ab]{3}"}, {"guided_grammar": 'start: ("a" | "b") ~ 3'}]
    for body in several:
        text = client.completions.create(model="base", prompt="x", extra_body=body).choices[0].text
        assert len(text) == 3 and set(text) <= {"a", "b"}
    with pytest.raises(openai.BadRequestError, match="one constraint"):
        client.completions.create(model="base", prompt="x", extra_body=several[0] | several[1])
    with pytest.raises(openai.BadRequestError, match="regular expression"):
        client.completions.create(model="base", prompt="x", extra_body={"guided_regex": "a("})
    anything = client.chat.completions.create(
        model="taught", messages=HELLO, temperature=0, max_tokens=3, response_format={"type": "json_object"}
    )
    assert (anything.choices[0].message.content or "").startswith("{")


def test_the_likeliest_of_several_and_beams(client: openai.OpenAI, engine: NativeEngine) -> None:
    shared: Any = dict(model="base", prompt=[5, 6, 7], max_tokens=6)
    every = client.completions.create(**shared, n=6, seed=2, logprobs=0).choices
    best = max(every, key=lambda c: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs))  # type: ignore[union-attr,arg-type]
    assert client.completions.create(**shared, best_of=6, seed=2).choices[0].text == best.text
    beams = client.completions.create(**shared, n=2, extra_body={"num_beams": 3, "length_penalty": 0.5})
    streamed = ["", ""]
    for chunk in client.completions.create(
        **shared, n=2, extra_body={"num_beams": 3, "length_penalty": 0.5}, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in beams.choices] == streamed
    with pytest.raises(openai.BadRequestError, match="beams"):
        client.completions.create(**shared, n=4, extra_body={"num_beams": 3})


@pytest.mark.parametrize("prompt", ["Hello 你好", [5, 6, 70, 80]])
def test_an_echoed_prompt(client: openai.OpenAI, app: Any, prompt: Any) -> None:
    base = app.state.service.engines["base"]
    ids = base.encode(prompt) if isinstance(prompt, str) else prompt
    shared: Any = dict(model="base", prompt=prompt, temperature=0, max_tokens=3)
    plain = client.completions.create(**shared).choices[0].text
    before = prompt if isinstance(prompt, str) else base.decode(ids, special=True)
    assert client.completions.create(**shared, echo=True).choices[0].text == before + plain
    assert (
        "".join(c.choices[0].text for c in client.completions.create(**shared, echo=True, stream=True))
        == before + plain
    )
    logprobs = client.completions.create(**shared, echo=True, logprobs=2).choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.tokens is not None
    assert logprobs.tokens[: len(ids)] == [base.decode([id], special=True) for id in ids]
    assert logprobs.token_logprobs[0] is None and len(logprobs.token_logprobs) == len(ids) + 3
    scored = base.score([ids[:1]], [ids[1:]])[0]
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(list(scored.logprobs), abs=1e-3)
    with pytest.raises(openai.BadRequestError, match="stream"):
        client.completions.create(**shared, echo=True, logprobs=2, stream=True)


def test_text_that_spells_control_tokens_stays_text(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="base", prompt="<|im_start|>", max_tokens=1)
    assert reply.usage and reply.usage.prompt_tokens > 5  # letter by letter, not the one token


@pytest.mark.parametrize(
    ("options", "error", "needle"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "taught, base"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, 'did you mean "temperature"'),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, openai.BadRequestError, "role"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, openai.BadRequestError, "context"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "json_schema"),
        ({"response_format": {"type": "yaml"}}, openai.BadRequestError, "response_format"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, openai.BadRequestError, "logit_bias"),
        ({"model": "base"}, openai.BadRequestError, "chat template"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests(
    client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], needle: str, stream: bool
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**({"model": "taught", "messages": HELLO, "stream": stream} | options))
    assert needle in raised.value.message
    body: Any = raised.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"
    expected = {openai.NotFoundError: "model_not_found"}.get(error)
    assert expected is None or body["code"] == expected
    if needle == "context":
        assert body["code"] == "context_length_exceeded"


def test_eight_streams_at_once(url: str) -> None:
    async def one(client: openai.AsyncOpenAI, ask: str) -> str:
        stream = await client.chat.completions.create(
            model="taught", messages=[{"role": "user", "content": ask}], temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, ask) for ask in [*tiny.TAUGHT, *tiny.TAUGHT]))

    with ThreadPoolExecutor(1) as own:  # in this thread Playwright, of tests before, may have its loop running
        found = own.submit(lambda: asyncio.run(all_of_them())).result()
    assert found == [*tiny.TAUGHT.values(), *tiny.TAUGHT.values()]
