"""The chat in the terminal, with what a person types."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from fledge.core.errors import FledgeError
from fledge.inference.engine import Delta, PromptTooLong, Request
from fledge.inference.native import NativeEngine
from fledge.inference.retrieval.reading import Passage
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


class Shelf:
    """A retriever that always finds the same passages, but for one question."""

    passages = (
        Passage("The boiler is repaired by the janitor.", "house.md", "L3"),
        Passage("The roof was painted in May.", "house.md", "L9"),
    )

    def search(self, query: str, k: int = 4) -> list[Passage]:
        return [] if query == "unknown" else list(self.passages)


class Cites(Scripted):
    """It has room for two passages, or for one, and cites the first and one that is not there."""

    context = 4000
    longest = 4000

    def count(self, request: Request) -> int:
        if len((request.messages or ())[-1].content) > self.longest:
            raise PromptTooLong("too long")
        return super().count(request)

    def stream(self, request: Request) -> Iterator[Delta]:
        self.asked.append(request)
        yield Delta("The janitor [1][7].", finish_reason="stop")


def test_with_an_index_the_model_is_shown_what_a_message_finds() -> None:
    engine = Cites()
    said = talk(engine, "Who repairs the boiler?", "unknown", search=Shelf())
    first, second = (request.messages or () for request in engine.asked)
    assert all(passage.text in first[-1].content for passage in Shelf.passages)
    assert first[-1].content.rstrip().endswith("Who repairs the boiler?")
    contents = ["Who repairs the boiler?", "The janitor [1][7].", "unknown"]
    assert [message.content for message in second] == contents, "the talk itself holds no passages"
    assert said.count("[1] house.md#L3") == 1 and "no passage [7]" in said and "#L9" not in said
    assert "nothing was found" in said


def test_passages_that_do_not_fit_are_left_out() -> None:
    engine = Cites()
    talk(engine, "Who repairs the boiler?", search=Shelf())
    engine.longest = len((engine.asked[0].messages or ())[-1].content) - 1
    talk(engine, "Who repairs the boiler?", search=Shelf())
    shown = (engine.asked[1].messages or ())[-1].content
    assert Shelf.passages[0].text in shown and Shelf.passages[1].text not in shown
    engine.longest = 30
    assert "house.md" not in talk(engine, "Who repairs the boiler?", search=Shelf())
    assert [message.content for message in engine.asked[2].messages or ()] == ["Who repairs the boiler?"]
