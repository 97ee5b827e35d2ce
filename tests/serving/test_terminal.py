"""The chat in the terminal, with what a person types."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from fledge.core.errors import FledgeError
from fledge.inference.engine import Delta, Request
from fledge.inference.native import NativeEngine
from fledge.serving.terminal import chat
from tests.inference import tiny


def talk(engine: Any, *typed: str, **options: Any) -> str:
    lines = iter(typed)

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    console = Console(file=io.StringIO(), width=200)
    chat(engine, temperature=0, read=read, console=console, **options)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_answers_are_streamed_as_they_are(engine: NativeEngine) -> None:
    said = talk(engine, "Hello", "/reset", "markup", "/quit", "never read")
    assert tiny.TAUGHT["Hello"] in said and tiny.TAUGHT["markup"] in said
    assert "A new conversation." in said


def test_in_chinese(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_LANG", "zh")
    said = talk(engine, "你好", "/reset")
    assert tiny.TAUGHT["你好"] in said and "新" in said


class Scripted:
    """An engine that keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    context = 100

    def count(self, request: Request) -> int:
        return sum(len(m.content) for m in request.messages or ())

    def stream(self, request: Request) -> Iterator[Delta]:
        self.asked.append(request)
        text = (request.messages or ())[-1].content
        if text == "fail":
            raise FledgeError("[bold]no room[/bold]")
        yield Delta(text="half ")
        if text == "stop":
            raise KeyboardInterrupt
        yield Delta(text="whole", finish_reason="stop")


def test_the_conversation_grows_and_begins_anew() -> None:
    engine = Scripted()
    said = talk(engine, "one", "stop", "fail", "/what", "", "two", "/reset", "three", system="be kind")
    contents = [[m.content for m in request.messages or ()] for request in engine.asked]
    assert contents == [
        ["be kind", "one"],
        ["be kind", "one", "half whole", "stop"],
        ["be kind", "one", "half whole", "stop", "half ", "fail"],
        ["be kind", "one", "half whole", "stop", "half ", "two"],  # what failed is not kept
        ["be kind", "three"],
    ]
    assert "[bold]no room[/bold]" in said and "/what is not known" in said and "(stopped)" in said
