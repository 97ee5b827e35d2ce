"""The same model in ONNX Runtime and in OpenVINO GenAI: the native engine's tokens, numbers and errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fledge.core.errors import FledgeError
from fledge.inference.engine import Constraint, PromptTooLong, Request
from fledge.inference.engines.errors import CannotDo
from fledge.inference.engines.onnx import OnnxEngine
from fledge.inference.engines.openvino import OpenVinoEngine
from fledge.inference.native import NativeEngine
from fledge.records.kinds import Message

GREEDY = [Request(prompt_ids=tuple(range(5, 5 + n)), temperature=0, max_new_tokens=20, stop_ids=()) for n in (1, 3, 30)]
DRAWN = [
    Request(text="hello 你好 👋", seed=3, n=3, max_new_tokens=15, logprobs=2),
    Request(messages=(Message("user", "help"),), seed=9, top_p=0.8, repetition_penalty=1.3, max_new_tokens=12),
    Request(text="how", temperature=0, logit_bias={40: 30.0}, stop=("can",), max_new_tokens=12),
    Request(text="how", seed=2, constraint=Constraint("regex", "(yes|no)-[0-9]{3}"), max_new_tokens=12),
]


@pytest.fixture(scope="module")
def onnx(graph_home: Path, folder: Path) -> Iterator[OnnxEngine]:
    with OnnxEngine(folder, threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def openvino(graph_home: Path, folder: Path) -> Iterator[OpenVinoEngine]:
    with OpenVinoEngine(folder) as made:
        yield made


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def local(request: Any) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[NativeEngine]:
    """The native engine on the same folder, with the same ends of text."""
    with NativeEngine.from_folder(folder, "float32") as made:
        yield made


def test_greedy_answers_are_the_native_engines_token_for_token(engine: NativeEngine, local: Any) -> None:
    more = [Request(prompt_ids=(7, 9, n), temperature=0, max_new_tokens=n) for n in range(4, 40)]
    chat = Request(messages=(Message("user", "help"),), temperature=0, max_new_tokens=12)
    requests = [*GREEDY, chat, Request(text="how 你好", temperature=0, stop=("can", "好"), max_new_tokens=30), *more]
    for here, there in zip(engine.generate(requests), local.generate(requests), strict=True):
        assert there.choice == here.choice and there.prompt_tokens == here.prompt_tokens


def test_draws_constraints_and_biases_too_where_the_sampling_is_ours(engine: NativeEngine, onnx: OnnxEngine) -> None:
    for here, there in zip(engine.generate(DRAWN), onnx.generate(DRAWN), strict=True):
        assert there.error is None
        for mine, its in zip(here.choices, there.choices, strict=True):
            assert (its.text, its.token_ids, its.finish_reason) == (mine.text, mine.token_ids, mine.finish_reason)
            assert [p.logprob for p in its.logprobs] == pytest.approx([p.logprob for p in mine.logprobs], abs=1e-4)


def test_a_seed_repeats_where_it_is_not_ours(openvino: OpenVinoEngine) -> None:
    request = Request(text="how", seed=7, n=3, temperature=0.9, top_k=20, max_new_tokens=10, stop_ids=())
    one, two = openvino.generate([request, request])
    assert [c.token_ids for c in one.choices] == [c.token_ids for c in two.choices]
    assert len({c.token_ids for c in one.choices}) > 1


def test_scores_and_vectors_are_the_native_engines(engine: NativeEngine, onnx: OnnxEngine) -> None:
    prompts, continuations = [[5, 6, 7], [40], [9] * 100], [[8], [300, 2, 1], [4, 5]]
    for mine, its in zip(engine.score(prompts, continuations), onnx.score(prompts, continuations), strict=True):
        assert its.logprobs == pytest.approx(mine.logprobs, abs=1e-4) and its.greedy == mine.greedy
    for mine, its in zip(engine.embed(["hello", "你好"]), onnx.embed(["hello", "你好"]), strict=True):
        assert its == pytest.approx(mine, abs=1e-5)


def test_what_is_not_shown_is_refused(openvino: OpenVinoEngine) -> None:
    for request in (*DRAWN[:1], *DRAWN[2:]):
        with pytest.raises(CannotDo, match=r"openvino(.|\n)*native, onnx"):
            openvino.submit(request, lambda delta: None)
    with pytest.raises(CannotDo, match="score"):
        openvino.score([[5]], [[6]])
    with pytest.raises(CannotDo, match="embed"):
        openvino.embed(["a"])


def test_the_context_is_full_and_no_more(engine: NativeEngine, local: Any) -> None:
    assert local.context == engine.context == 256
    request = Request(prompt_ids=(5,) * 250, temperature=0, stop_ids=())
    here, there = engine.generate([request])[0].choice, local.generate([request])[0].choice
    assert there == here and len(there.token_ids) == 6 and there.finish_reason == "length"


def test_wrong_requests_fail_alone(local: Any) -> None:
    wrong = {
        PromptTooLong: Request(prompt_ids=(5,) * 256),
        FledgeError: Request(prompt_ids=(330,)),
        CannotDo: Request(text="a", beams=2),
    }
    *errors, good = local.generate([*wrong.values(), GREEDY[0]])
    assert [type(result.error) for result in errors] == list(wrong)
    assert good.choice == local.generate([GREEDY[0]])[0].choice
    with pytest.raises(CannotDo, match="native"):
        local.reward([])


def test_a_cancelled_request_leaves_and_the_others_go_on(engine: NativeEngine, local: Any) -> None:
    first, ended = threading.Event(), threading.Event()
    heard: list[Any] = []

    def listen(delta: Any) -> None:
        heard.append(delta)
        first.set()
        if delta.finish_reason:
            ended.set()

    handle = local.submit(Request(prompt_ids=(5, 6), temperature=0, stop_ids=(), max_new_tokens=240), listen)
    assert first.wait(20)
    handle.cancel()
    assert local.generate([GREEDY[1]])[0].choice == engine.generate([GREEDY[1]])[0].choice
    assert ended.wait(20) and heard[-1].finish_reason == "cancelled" and len(heard) < 240
