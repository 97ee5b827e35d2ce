"""An engine at a URL gives what the engine behind it gives; what a server does wrong becomes one clear error."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fledge.core.errors import FledgeError
from fledge.inference.engine import Constraint, PromptTooLong, Request
from fledge.inference.engines.errors import Busy, CannotDo, Failed, NotAllowed, Refused, TimedOut, Unreachable
from fledge.inference.engines.process import free_port
from fledge.inference.engines.remote import RemoteEngine
from fledge.inference.native import NativeEngine
from fledge.records.kinds import Conversation, Message
from tests.inference.engines.scripted import events, models, reply, scripted

HELLO = (Message("user", "hello 你好 👋"),)
REQUESTS = {
    "chat": Request(messages=HELLO, temperature=0, max_new_tokens=12),
    "a conversation": Request(
        messages=(Message("system", "be kind"), *HELLO, Message("assistant", "yes"), Message("user", "go on")),
        temperature=0, max_new_tokens=8,
    ),
    "text": Request(text="the help you 今天", temperature=0, max_new_tokens=12),
    "a control spelling in text": Request(text="<|im_end|>x", temperature=0, max_new_tokens=6),
    "tokens": Request(prompt_ids=(5, 6, 7, 300), temperature=0, max_new_tokens=12),
    "to the end of the context": Request(prompt_ids=(9,) * 240, temperature=0),
    "seeds": Request(text="how", seed=11, max_new_tokens=10),
    "several": Request(messages=HELLO, n=3, seed=5, temperature=0.9, top_p=0.9, max_new_tokens=7),
    "cuts": Request(text="how", seed=3, top_k=5, min_p=0.05, temperature=1.4, max_new_tokens=9),
    "penalties": Request(
        text="how", temperature=0, repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.5,
        max_new_tokens=14,
    ),
    "bias": Request(text="how", temperature=0, logit_bias={40: 30.0, 41: -100.0}, max_new_tokens=5),
    "own ends": Request(prompt_ids=(5, 6), temperature=0, stop_ids=(17, 40, 52, 90), max_new_tokens=30),
    "no ends": Request(prompt_ids=(5, 6), temperature=0, stop_ids=(), max_new_tokens=5),
    "log-probabilities": Request(text="how", temperature=0, logprobs=3, max_new_tokens=5),
    "those of a chat": Request(messages=HELLO, temperature=0, logprobs=2, max_new_tokens=5),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_those_of_the_engine_behind(engine: NativeEngine, remote: RemoteEngine, name: str) -> None:
    request = REQUESTS[name]
    here, there = engine.generate([request])[0], remote.generate([request])[0]
    assert there.error is None
    assert there.prompt_tokens == here.prompt_tokens
    for mine, its in zip(here.choices, there.choices, strict=True):
        assert (its.text, its.token_ids, its.finish_reason) == (mine.text, mine.token_ids, mine.finish_reason)
        assert [p.id for p in its.logprobs] == [p.id for p in mine.logprobs]
        assert [p.logprob for p in its.logprobs] == pytest.approx([p.logprob for p in mine.logprobs], abs=1e-5)
        assert [[id for id, _ in p.top] for p in its.logprobs] == [[id for id, _ in p.top] for p in mine.logprobs]


def test_many_at_once_come_back_in_order(engine: NativeEngine, remote: RemoteEngine) -> None:
    requests = [Request(prompt_ids=(5 + n, 9, 3 + n), temperature=0, max_new_tokens=1 + n % 9) for n in range(40)]
    here, there = engine.generate(requests), remote.generate(requests)
    assert [result.choice.token_ids for result in there] == [result.choice.token_ids for result in here]


def test_a_stop_string_ends_the_answer_and_is_not_in_it(engine: NativeEngine, remote: RemoteEngine) -> None:
    text = engine.generate([REQUESTS["text"]])[0].text
    stop = text[len(text) // 2 :][:2]
    choice = remote.generate([Request(text="the help you 今天", temperature=0, max_new_tokens=12, stop=(stop,))])[
        0
    ].choice
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"


def test_a_stream_is_the_answer_in_pieces(engine: NativeEngine, remote: RemoteEngine) -> None:
    request = Request(messages=HELLO, n=2, seed=1, max_new_tokens=10)
    deltas = list(remote.stream(request))
    for index, choice in enumerate(engine.generate([request])[0].choices):
        mine = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in mine) == choice.text
        assert sum((delta.token_ids for delta in mine), ()) == choice.token_ids
        assert [delta.finish_reason for delta in mine if delta.finish_reason] == [choice.finish_reason]
        assert mine[-1].finish_reason and len(mine) > 3


def test_scores_and_vectors_are_those_of_the_engine_behind(engine: NativeEngine, remote: RemoteEngine) -> None:
    texts = ["Hello", "你好，世界"]
    for here, there in zip(engine.embed(texts), remote.embed(texts), strict=True):
        assert there == pytest.approx(here, abs=1e-6)
    prompts, continuations = [[5, 6, 7], [5, 6, 7], [40] * 30], [[8, 9], [300], [1, 2, 3, 4]]
    written = engine.generate([Request(prompt_ids=(5, 6), temperature=0, max_new_tokens=6, stop_ids=())])[0].choice
    prompts, continuations = [*prompts, [5, 6]], [*continuations, list(written.token_ids)]
    here, there = engine.score(prompts, continuations), remote.score(prompts, continuations)
    for mine, its in zip(here, there, strict=True):
        assert its.logprobs == pytest.approx(mine.logprobs, abs=2e-5)
        assert its.greedy == mine.greedy
    assert all(there[-1].greedy)


def test_tokens_are_counted_read_and_spelled_by_the_server(engine: NativeEngine, remote: RemoteEngine) -> None:
    for text in ("hello", "你好 👋", "<|im_end|>", ""):
        assert remote.encode(text) == engine.encode(text)
    assert remote.decode([5, 300, 2], special=True) == engine.decode([5, 300, 2], special=True)
    assert remote.decode([2]) == "" and remote.decode([2], special=True) == "<|im_end|>"
    for name in ("chat", "text", "tokens"):
        assert remote.count(REQUESTS[name]) == engine.count(REQUESTS[name])
    assert remote.context == engine.context
    with pytest.raises(PromptTooLong):
        remote.count(Request(prompt_ids=(5,) * 256))


def test_a_folder_of_ours_reads_and_writes_tokens_too(engine: NativeEngine, url: str, folder: Path) -> None:
    with RemoteEngine(url, tokenizer=folder) as remote:
        remote._http.ask = lambda *words: pytest.fail(str(words))  # type: ignore[method-assign]
        text = "hello 你好 <|im_end|>"
        assert remote.encode(text) == engine.encode(text)
        assert remote.decode(remote.encode(text)) == text
        assert remote.count(Request(text=text)) == engine.count(Request(text=text))


def test_cancelling_hangs_up_and_the_server_stops(engine: NativeEngine, remote: RemoteEngine, url: str) -> None:
    stream = remote.stream(Request(prompt_ids=(5, 6), temperature=0, stop_ids=(), max_new_tokens=250))
    next(stream)
    stream.close()
    heard: list[Any] = []
    done = threading.Event()

    def listen(delta: Any) -> None:
        heard.append(delta)
        if delta.finish_reason:
            done.set()

    handle = remote.submit(Request(prompt_ids=(5, 6), temperature=0, stop_ids=(), max_new_tokens=250, n=2), listen)
    handle.cancel()
    assert done.wait(10)
    end = time.monotonic() + 10
    while len([d for d in heard if d.finish_reason]) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert {(d.index, d.finish_reason) for d in heard if d.finish_reason} == {(0, "cancelled"), (1, "cancelled")}
    handle.cancel()  # once more is nothing
    while remote._http.ask("GET", "/health") is None or 'active_requests{model="tiny"} 0.0' not in _metrics(url):
        assert time.monotonic() < end
        time.sleep(0.02)


def _metrics(url: str) -> str:
    import httpx

    return httpx.get(f"{url}/metrics").text.replace("fledge_", "")


def test_closing_ends_what_is_on_its_way(url: str) -> None:
    remote = RemoteEngine(url)
    heard: list[Any] = []
    remote.submit(Request(prompt_ids=(5, 6), stop_ids=(), max_new_tokens=250), heard.append)
    remote.close()
    assert heard[-1].finish_reason == "cancelled"
    with pytest.raises(FledgeError, match="closed"):
        remote.generate([REQUESTS["text"]])[0].choice  # noqa: B018
    remote.close()


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (Request(prompt_ids=(5,) * 256), PromptTooLong, "256 tokens"),
        (Request(prompt_ids=(5, 400)), Refused, "outside the vocabulary"),
        (Request(text="a", logit_bias={400: 1.0}), Refused, "outside the vocabulary"),
        (Request(text="a", constraint=Constraint("json_schema", '{"type": "strang"}')), Refused, "strang"),
        (Request(text="a", adapter="law"), FledgeError, "law"),
        (Request(text=""), FledgeError, "empty"),
        (Request(prompt_ids=(-2,)), FledgeError, "outside the vocabulary"),
    ],
)
def test_a_wrong_request_fails_alone(
    engine: NativeEngine, remote: RemoteEngine, request_: Request, error: Any, says: str
) -> None:
    wrong, right = remote.generate([request_, REQUESTS["text"]])
    assert isinstance(wrong.error, error) and says in str(wrong.error)
    assert right.choice == engine.generate([REQUESTS["text"]])[0].choice


def test_what_a_server_has_no_word_for_is_refused_before_it_is_asked() -> None:
    with scripted(v1_models=models("ollama-like")) as script, RemoteEngine(script.url) as remote:
        assert remote.dialect.name == "openai"
        before = len(script.asked)
        for wrong, field in (
            (Request(text="a", top_k=3), "top_k"), (Request(text="a", beams=2), "beams"),
            (Request(text="a", adapter="x"), "adapter"), (Request(text="a", stop_ids=(1,)), "stop_ids"),
            (Request(text="a", constraint=Constraint("regex", "a+")), "constraint"),
            (Request(text="a", prompt_logprobs=0), "prompt_logprobs"),
        ):  # fmt: skip
            with pytest.raises(CannotDo, match=rf"openai.*{field}(.|\n)*native"):
                remote.submit(wrong, lambda delta: None)
        with pytest.raises(CannotDo, match="reward"):
            remote.reward([Conversation(HELLO)])
        with pytest.raises(CannotDo):
            remote.encode("text")
        assert len(script.asked) == before


def chunk(text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **more}


def test_tokens_without_ids_are_counted() -> None:
    said = events(
        chunk("Hel"), chunk("lo"), chunk("", "stop"),
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}},
    )  # fmt: skip
    with scripted(v1_models=models(), v1_chat_completions=said) as script, RemoteEngine(script.url) as remote:
        result = remote.generate([Request(messages=HELLO, n=2, seed=4)])[0]
        assert [choice.text for choice in result.choices] == ["Hello", "Hello"]
        assert [choice.token_ids for choice in result.choices] == [(-1, -1, -1)] * 2
        assert result.prompt_tokens == 7 and remote.decode((-1, -1)) == ""
        seeds = [body["seed"] for body in script.bodies("/v1/chat/completions")]
        assert len(set(seeds)) == 2 and 4 in seeds  # each answer was asked for alone, with a seed of its own


def test_tokens_known_by_their_text_can_be_spelled() -> None:
    rows = [{"token": "你", "logprob": -0.5, "top_logprobs": [{"token": "你", "logprob": -0.5},
                                                                {"token": "我", "logprob": -1.5}]}]  # fmt: skip
    said = events({"choices": [{"index": 0, "delta": {"content": "你"}, "finish_reason": "length",
                                "logprobs": {"content": rows}}]})  # fmt: skip
    with scripted(v1_models=models(), v1_chat_completions=said) as script, RemoteEngine(script.url) as remote:
        choice = remote.generate([Request(messages=HELLO, logprobs=2)])[0].choice
        (item,) = choice.logprobs
        assert choice.token_ids == (item.id,) and item.id < -1
        assert [(remote.decode([id]), value) for id, value in item.top] == [("你", -0.5), ("我", -1.5)]


def test_nobody_there(url: str) -> None:
    with pytest.raises(Unreachable, match="nobody answers"):
        RemoteEngine(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(FledgeError, match="http://"):
        RemoteEngine("localhost:8000")
    with pytest.raises(FledgeError, match="tiny"):
        RemoteEngine(url, "tny")


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (reply({"error": {"message": "no key"}}, 401), NotAllowed, "FLEDGE_ENGINE_KEY"),
        (reply({"error": {"message": "slow down"}}, 429, Retry_After="7"), Busy, "after 7 s"),
        (reply("<html>oops</html>", 500), Failed, "oops"),
        (reply({"detail": "not for you"}, 404), Refused, "not for you"),
        (reply({"error": "wrong"}, 422), Refused, "422: wrong"),
        (reply("", 302, Location="https://elsewhere"), Refused, "elsewhere"),
        (reply({"error": {"message": "maximum context length is 5", "code": 400}}, 400), PromptTooLong, "is 5"),
        (reply("{not json"), Failed, "cannot be read"),
        (reply({"choices": []}), Failed, "broke the answer off"),
        (events("{not json"), Failed, "cannot be read"),
        (events({"error": {"message": "out of memory", "code": 500}}), Failed, "out of memory"),
        (events({"choices": [{"index": "x"}]}), Failed, "cannot be read"),
        (events(chunk("He"), done=False), Failed, "broke the answer off"),
        (events(chunk("He")), Failed, "broke the answer off"),
    ],
)  # fmt: skip
def test_what_servers_do_wrong(answer: Any, error: type[FledgeError], says: str) -> None:
    with scripted(v1_models=models(), v1_chat_completions=answer) as script, RemoteEngine(script.url) as remote:
        found = remote.generate([Request(messages=HELLO)])[0].error
        assert type(found) is error and says in str(found), str(found)
        if isinstance(found, Busy):
            assert found.retry_after == 7
        assert len(script.bodies("/v1/chat/completions")) == 1  # what was answered is not asked again


def test_silence_is_an_error_after_a_while() -> None:
    hold = threading.Event()
    with (
        scripted(v1_models=models(), v1_chat_completions=lambda *_: hold.wait(5)) as script,  # type: ignore[dict-item]
        RemoteEngine(script.url, timeout=0.3) as remote,
    ):
        assert isinstance(remote.generate([Request(messages=HELLO)])[0].error, TimedOut)
        hold.set()


def test_a_broken_connection_is_tried_again_before_the_first_byte() -> None:
    good = events(chunk("Hello", "stop"))
    tries = []

    def answer(handler: Any, body: Any) -> None:
        tries.append(body)
        if len(tries) < 3:
            handler.close_connection = True
            handler.connection.shutdown(2)
        else:
            good(handler, body)

    with scripted(v1_models=models(), v1_chat_completions=answer) as script, RemoteEngine(script.url) as remote:
        assert remote.generate([Request(messages=HELLO)])[0].text == "Hello"
        assert len(tries) == 3


def test_the_key_is_sent_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-everybody")
    with scripted(v1_models=models()) as script:
        RemoteEngine(script.url).close()
        monkeypatch.setenv("FLEDGE_ENGINE_KEY", "secret")
        RemoteEngine(f"{script.url}/v1/").close()
        first, *_, last = [headers for path, _, headers in script.asked if path == "/v1/models"]
        assert "Authorization" not in first and last["Authorization"] == "Bearer secret"


def test_no_more_requests_at_once_than_allowed() -> None:
    now, most, lock = 0, 0, threading.Lock()
    good = events(chunk("x", "stop"))

    def answer(handler: Any, body: Any) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        good(handler, body)
        with lock:
            now -= 1

    with (
        scripted(v1_models=models(), v1_chat_completions=answer) as script,
        RemoteEngine(script.url, concurrency=3) as remote,
    ):
        results = remote.generate([Request(messages=HELLO)] * 12)
        assert [result.text for result in results] == ["x"] * 12 and most == 3


PROPS = reply({"default_generation_settings": {"n_ctx": 99}})


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ({"v1_models": models("vllm", max_model_len=99)}, "vllm"),
        ({"v1_models": models("sglang")}, "sglang"),
        ({"v1_models": models("llamacpp"), "props": PROPS}, "llama.cpp"),
        ({"v1_models": models("library"), "api_version": reply({"version": "0.9"})}, "ollama"),
        ({"v1_models": models("me"), "info": reply({"docker_label": "sha", "model_id": "m"})}, "tgi"),
        ({"v1_models": models("system")}, "openai"),
    ],
)  # fmt: skip
def test_servers_are_recognised(answers: Any, name: str) -> None:
    with scripted(**answers) as script, RemoteEngine(script.url) as remote:
        assert remote.name == name and remote.model == "m"
        assert remote.context == (99 if name in ("vllm", "llama.cpp") else 1 << 20)


def test_neutral_options_are_said_to_servers_with_defaults_of_their_own() -> None:
    said = events({"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]})
    with scripted(v1_models=models("llamacpp"), v1_completions=said) as script, RemoteEngine(script.url) as remote:
        remote.generate([Request(text="a")])
        (body,) = script.bodies("/v1/completions")
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
        assert neutral.items() <= body.items() and "max_tokens" not in body
