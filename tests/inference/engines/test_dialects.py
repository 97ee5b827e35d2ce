"""Other servers in their own words: what each is sent, and how its replies are read. The words are of their docs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fledge.inference.engine import Constraint, Request, TokenLogprob
from fledge.inference.engines.dialects import DIALECTS
from fledge.inference.engines.remote import RemoteEngine
from fledge.inference.engines.wire import body
from fledge.records.kinds import Message
from tests.inference.engines.scripted import events, models, reply, scripted

SCHEMA = {"type": "object", "properties": {"城市": {"type": "string"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
JSON, RANGE = Constraint("json_schema", json.dumps(SCHEMA)), Constraint("regex", "[0-9]+")
CHAT = {"messages": (Message("user", "你好"),), "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("name", "request_", "sent"),
    [
        ("vllm", Request(**CHAT, constraint=RANGE), {"structured_outputs": {"regex": "[0-9]+"}}),
        ("vllm", Request(**CHAT, constraint=JSON), {"response_format": FORMAT}),
        ("vllm", Request(**CHAT, repetition_penalty=1.3, top_k=4), {"repetition_penalty": 1.3, "top_k": 4}),
        ("vllm", Request(text="a", stop_ids=(7,)), {"ignore_eos": True, "stop_token_ids": [7], "max_tokens": None}),
        ("vllm", Request(**CHAT, adapter="law"), {"model": "law", "return_token_ids": True}),
        ("llama.cpp", Request(**CHAT, constraint=JSON), {"json_schema": SCHEMA}),
        ("llama.cpp", Request(**CHAT, constraint=Constraint("json")), {"json_schema": {}}),
        ("llama.cpp", Request(**CHAT, repetition_penalty=1.3), {"repeat_penalty": 1.3}),
        ("llama.cpp", Request(**CHAT, logprobs=0), {"logprobs": True, "top_logprobs": 1}),
        ("llama.cpp", Request(text="a", logprobs=0), {"logprobs": 1}),
        ("sglang", Request(**CHAT, constraint=RANGE), {"regex": "[0-9]+"}),
        ("tgi", Request(**CHAT, constraint=JSON), {"response_format": {"type": "json", "value": SCHEMA}}),
        ("ollama", Request(**CHAT, constraint=JSON), {"response_format": FORMAT}),
        ("openai", Request(**CHAT, logprobs=0), {"logprobs": True, "top_logprobs": 0}),
        ("fledge", Request(**CHAT, constraint=RANGE, best_of=3), {"guided_regex": "[0-9]+", "best_of": 3}),
    ],
)
def test_what_each_is_sent(name: str, request_: Request, sent: dict[str, Any]) -> None:
    dialect = DIALECTS[name]
    assert not dialect.missing(request_)
    found = body(request_, None, "m", dialect, None)
    assert {key: found.get(key, "nothing") for key in sent} == sent


def test_vllm_is_read_by_its_ids() -> None:
    prompt = [None, {"6": {"logprob": -2.0, "rank": 9}, "8": {"logprob": -0.1, "rank": 1}}]
    chosen = {"tokens": ["token_id:40"], "token_logprobs": [-0.25],
              "top_logprobs": [{"token_id:40": -0.25, "token_id:41": -1.5, "token_id:42": -3.0}]}  # fmt: skip
    choice = {"index": 0, "text": "你", "token_ids": [40], "finish_reason": "length", "logprobs": chosen}
    usage = {"prompt_tokens": 2, "completion_tokens": 1}
    said = reply({"choices": [choice | {"prompt_logprobs": prompt}], "usage": usage})
    answers = {"v1_models": models("vllm", max_model_len=64), "v1_completions": said}
    asked = Request(prompt_ids=(5, 6), logprobs=2, prompt_logprobs=1, max_new_tokens=1)
    with scripted(**answers) as script, RemoteEngine(script.url) as remote:
        result = remote.generate([asked])[0]
    (sent,) = script.bodies("/v1/completions")
    assert sent["prompt"] == [5, 6] and sent["prompt_logprobs"] == 1 and sent["logprobs"] == 2
    assert result.choice.token_ids == (40,) and result.prompt_tokens == 2
    assert result.choice.logprobs == (TokenLogprob(40, -0.25, ((40, -0.25), (41, -1.5))),)
    assert result.prompt_logprobs == (None, TokenLogprob(6, -2.0, ((8, -0.1),)))


def test_llama_cpp_names_ids_with_log_probabilities_and_gives_no_more_than_was_asked_for() -> None:
    rows = [{"id": 40, "token": "你", "logprob": -0.5, "top_logprobs": [{"id": 41, "token": "我", "logprob": -0.1}]}]
    last = {"index": 0, "delta": {"content": "你"}, "finish_reason": "stop", "logprobs": {"content": rows}}
    said = events({"choices": [last]}, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    answers = {"v1_models": models("llamacpp"), "v1_chat_completions": said}
    with scripted(**answers) as script, RemoteEngine(script.url) as remote:
        plain, ranked = remote.generate([Request(**CHAT, logprobs=0), Request(**CHAT, logprobs=1)])
    assert plain.choice.logprobs == (TokenLogprob(40, -0.5),)
    assert ranked.choice.logprobs == (TokenLogprob(40, -0.5, ((41, -0.1),)),)
    assert plain.choice.token_ids == (40, -1) and remote.decode([40]) == "你"  # one token was only counted
