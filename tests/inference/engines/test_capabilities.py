"""What an engine can do is found out by asking, and an engine that only pretends is found out too."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fledge.inference.adapted import AdaptedEngine
from fledge.inference.engine import Delta, Listen, Request, Result
from fledge.inference.engines.capabilities import CHECKS, Capabilities, markdown, probe
from fledge.inference.engines.errors import Unreachable
from fledge.inference.engines.onnx import OnnxEngine
from fledge.inference.engines.openvino import OpenVinoEngine
from fledge.inference.engines.remote import RemoteEngine
from fledge.inference.native import NativeEngine
from fledge.serving.app import create_app
from tests.inference.engines.scripted import models, scripted
from tests.inference.test_adapters import write_adapter
from tests.serving.conftest import running

ROOT = Path(__file__).parents[3]
BEGIN, END = "<!-- capabilities: FLEDGE_WRITE_DOCS=1 writes this -->", "<!-- end -->"
REWARD_ONLY = {"reward"}


class Pretender:
    """An engine that takes every option and ignores it."""

    def __init__(self, engine: NativeEngine) -> None:
        self.engine, self.context = engine, engine.context
        self.encode, self.decode, self.count = engine.encode, engine.decode, engine.count
        self.embed, self.reward, self.score = (lambda texts: [[0.0, 1.0]] * len(texts)), self._reward, self._score

    def _plain(self, request: Request) -> Request:
        kept = {"messages": request.messages, "text": request.text, "prompt_ids": request.prompt_ids}
        return Request(**kept, max_new_tokens=request.max_new_tokens, temperature=request.temperature, n=request.n)

    def submit(self, request: Request, listen: Listen) -> Any:
        return self.engine.submit(self._plain(request), listen)

    def stream(self, request: Request) -> Iterator[Delta]:
        return self.engine.stream(self._plain(request))

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        results = self.engine.generate([self._plain(request) for request in requests])
        return [
            replace(result, choices=(result.choices * request.n)[: request.n])
            for request, result in zip(requests, results, strict=True)
        ]

    def _reward(self, conversations: Sequence[Any]) -> list[float]:
        return []

    def _score(self, prompts: Sequence[Any], continuations: Sequence[Any]) -> list[Any]:
        return self.engine.score(prompts, [[5] * len(ids) for ids in continuations])


@pytest.fixture(scope="module")
def asked(graph_home: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Capabilities]:
    adapter = write_adapter(folder, tmp_path_factory.mktemp("adapter") / "poems", 0)
    with (
        NativeEngine.from_folder(folder, "float32", adapters={"poems": adapter}) as native,
        running(create_app({"tiny": native, "poems": AdaptedEngine(native, "poems")})) as url,
        RemoteEngine(url) as remote, OnnxEngine(folder, threads=1) as onnx, OpenVinoEngine(folder) as openvino,
    ):  # fmt: skip
        engines = {"native": native, "URL (fledge)": remote, "onnx": onnx, "openvino": openvino}
        return {name: probe(each, ["poems"]) for name, each in engines.items()}


def test_our_own_engine_does_what_it_says_and_so_does_our_server(asked: dict[str, Capabilities]) -> None:
    for name in ("native", "URL (fledge)"):
        missing = {item.name: (item.works, item.found) for item in asked[name] if not item.works}
        assert set(missing) == REWARD_ONLY, missing


def test_what_the_other_runtimes_cannot_do(asked: dict[str, Capabilities]) -> None:
    ours = {"prompt_logprobs", "best_of", "beams", "adapters", "reward"}
    hidden = {"logprobs", "score", "embeddings", "logit_bias", "json", "json_schema", "regex", "grammar", "min_p"}
    for name, expected in {"onnx": ours, "openvino": ours | hidden}.items():
        assert {item.name for item in asked[name] if not item.works} == expected
        assert name in asked[name]["beams"].found


def test_an_engine_that_ignores_options_is_found_out(engine: NativeEngine) -> None:
    found = probe(Pretender(engine), adapters=["some"])  # type: ignore[arg-type]
    honest = {"text", "chat", "token prompts", "tokens", "streaming", "greedy repeats", "cancel", "n"}
    assert {item.name for item in found if item.works} == honest
    assert found["seed"].works is False and found["top_k"].works is False and found["json_schema"].works is False


def test_a_connection_that_breaks_says_nothing_of_the_engine() -> None:
    with scripted(v1_models=models()) as script:
        remote = RemoteEngine(script.url)
    with pytest.raises(Unreachable):
        probe(remote)
    remote.close()


def test_every_capability_is_asked_once_and_told(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, lambda ask: None)
    found = probe(engine, tell=told.append)
    assert told == list(CHECKS) == [item.name for item in found] and found.names() == []


@pytest.mark.parametrize("language", ["", "zh"])
def test_the_docs_say_what_was_answered(asked: dict[str, Capabilities], language: str) -> None:
    page = ROOT / "docs" / language / "engines.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    old, end, after = rest.partition(END)
    assert begin and end, f"{page} has no place for the table"
    new = f"\n{markdown(asked)}\n"
    if os.environ.get("FLEDGE_WRITE_DOCS"):
        page.write_text(before + BEGIN + new + END + after, encoding="utf-8")
    else:
        assert old == new, f"{page} is not what was answered: run this test with FLEDGE_WRITE_DOCS=1"
