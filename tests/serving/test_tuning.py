"""The flags of our own engine reach it from every command that opens one, and no other engine is given them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from click.testing import CliRunner

from fledge.cli.main import cli
from fledge.core.errors import FledgeError
from fledge.inference.native import NativeEngine
from tests.inference import tiny
from tests.inference.test_encoder_decoder import t5

FLAGS = (
    "--no-lookup", "--context=40", "--cache-bytes=100kB", "--max-slots=3", "--prefill-tokens=7",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tuned") / "model", tiny.llama())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every native engine from here on, and how it was made."""
    found: list[Any] = []
    construct = NativeEngine.__init__

    def noted(engine: NativeEngine, *given: Any, **options: Any) -> None:
        construct(engine, *given, **options)
        found.append(engine)

    monkeypatch.setattr(NativeEngine, "__init__", noted)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    return found


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("serve", ["--port=0", "--dtype=float32"], ""),
        ("chat", [], "/quit\n"),
        ("generate", ["--dtype=float32"], json.dumps({"prompt": "Hello", "max_tokens": 3, "temperature": 0})),
    ],
)
def test_the_flags_reach_the_engine(folder: Path, made: list[Any], command: str, more: list[str], said: str) -> None:
    given = [command, str(folder), *more, *FLAGS, f"--draft={folder}"]
    done = CliRunner().invoke(cli, given, input=said, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    [engine] = made
    assert engine.context == 40
    assert engine.statistics().blocks_total == 100_000 // engine.forward.bytes_per_block > 2
    assert (engine._scheduler.max_slots, engine._scheduler.prefill_tokens) == (3, 7)
    assert engine._guessing._model is not None and engine._guessing._lookup is False


def test_what_is_not_said_stays_as_the_engine_has_it(folder: Path, made: list[Any]) -> None:
    CliRunner().invoke(cli, ["chat", str(folder)], input="/quit\n", catch_exceptions=False)
    [engine] = made
    assert engine.context == 256 and engine._scheduler.max_slots == 64 and engine._scheduler.prefill_tokens == 256
    assert engine.statistics().blocks_total == (2 << 30) // engine.forward.bytes_per_block
    assert engine._guessing._model is None and engine._guessing._lookup is True


@pytest.mark.parametrize("command", ["serve", "chat", "generate"])
def test_another_engine_is_not_given_them(folder: Path, command: str) -> None:
    for model, engine, found in (
        (str(folder), "onnx", "onnx"),
        ("http://127.0.0.1:9", "native", "http://127.0.0.1:9"),
        (str(folder), "http://127.0.0.1:9", "http://127.0.0.1:9"),
    ):
        given = [command, model, f"--engine={engine}", "--draft=x", "--no-lookup"]
        with pytest.raises(FledgeError) as caught:
            CliRunner().invoke(cli, given, catch_exceptions=False)
        [problem] = caught.value.problems
        assert "native" in problem.what and problem.where == "--draft, --no-lookup" and problem.found == found


def test_nor_is_a_model_of_another_kind(tmp_path: Path) -> None:
    from fledge.models.save import save_model

    save_model(t5(), tiny.tokenizer(), tmp_path / "t5")
    with pytest.raises(FledgeError, match="decoder-only") as caught:
        CliRunner().invoke(cli, ["chat", str(tmp_path / "t5"), "--max-slots=2"], catch_exceptions=False)
    assert caught.value.problems[0].found == "encoder-decoder"


@pytest.mark.parametrize(("flag", "message"), [("--cache-bytes=2 boxes", "GiB"), ("--draft=nobody", "nobody")])
def test_wrong_values_are_said(folder: Path, flag: str, message: str) -> None:
    with pytest.raises(FledgeError, match=message):
        CliRunner().invoke(cli, ["chat", str(folder), flag], catch_exceptions=False)


def test_numbers_below_one_are_refused(folder: Path) -> None:
    done = CliRunner().invoke(cli, ["chat", str(folder), "--max-slots=0"])
    assert done.exit_code == 2 and "--max-slots" in done.output
