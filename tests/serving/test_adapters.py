"""One base, several LoRA adapters, each a model of its own name; and models that only make vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from transformers import LlamaModel

from fledge.cli.use import serve_model
from fledge.core.errors import FledgeError
from fledge.inference.embedding import EmbeddingEngine
from fledge.inference.engine import Request
from fledge.inference.native import NativeEngine
from fledge.inference.pooling import Pooling
from fledge.serving.app import create_app
from tests.inference import tiny
from tests.inference.test_adapters import write_adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("served")
    base = tiny.save(room / "base", tiny.llama())
    return {"base": base} | {name: write_adapter(base, room / name, seed) for seed, name in enumerate(("law", "诗"))}


@pytest.fixture(scope="module")
def app(folders: dict[str, Path]) -> Iterator[Any]:
    """The application that `fledge serve base --adapter law=… --adapter 诗=…` runs."""
    apps: list[Any] = []
    given = [f"{name}={folders[name]}" for name in ("law", "诗")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", lambda server, sockets: apps.append(server.config.app))
        patch.setattr(NativeEngine, "close", lambda engine: None)
        serve_model(str(folders["base"]), "127.0.0.1", 0, "float32", "base", given)
    yield apps[0]
    apps[0].state.service.engines["base"].close()


def test_models_are_listed_with_what_they_stand_on(app: Any) -> None:
    cards = TestClient(app).get("/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [("base", None), ("law", "base"), ("诗", "base")]


def test_each_name_answers_as_its_adapter(app: Any, folders: dict[str, Path]) -> None:
    client, told = TestClient(app), set()
    for name in ("base", "law", "诗"):
        ask = {"model": name, "prompt": "Hello", "max_tokens": 12, "temperature": 0}
        reply = client.post("/v1/completions", json=ask).json()
        assert reply["model"] == name
        with NativeEngine.from_folder(folders[name], dtype="float32", device="cpu") as alone:
            expected = alone.generate([Request(text="Hello", temperature=0, max_new_tokens=12)])[0].text
        assert reply["choices"][0]["text"] == expected
        told.add(expected)
    assert len(told) == 3
    wrong = client.post("/v1/completions", json={"model": "lwa", "prompt": "x"})
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("text", ["law", "=x", "base=FOLDER", "law="])
def test_adapters_are_named(folders: dict[str, Path], text: str) -> None:
    with pytest.raises(FledgeError, match="NAME=FOLDER"):
        serve_model(str(folders["base"]), "127.0.0.1", 0, "float32", "base", [text])


def test_vectors_over_http() -> None:
    torch.manual_seed(0)
    engine = EmbeddingEngine(LlamaModel(tiny.llama().config), tiny.tokenizer(), Pooling("last", unit=True))
    client, texts = TestClient(create_app({"vectors": engine})), ["Hello", "你好，世界"]
    rows = client.post("/v1/embeddings", json={"input": texts}).json()["data"]
    for row, vector in zip(rows, engine.embed(texts), strict=True):
        assert row["embedding"] == pytest.approx(vector, abs=1e-6)
        assert sum(x * x for x in row["embedding"]) == pytest.approx(1)
    refused = client.post("/v1/completions", json={"prompt": "x"})
    assert refused.status_code == 400 and "writes none" in refused.json()["error"]["message"]
