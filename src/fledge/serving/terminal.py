"""`fledge chat`: a conversation in the terminal, streamed. /reset begins anew, /quit leaves, Ctrl-C stops an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

from fledge.core.errors import FledgeError
from fledge.core.language import t
from fledge.inference.engine import Delta, Engine, Request
from fledge.inference.history import fitted
from fledge.records.kinds import Message


def chat(
    engine: Engine,
    system: str = "",
    temperature: float = 0.7,
    max_new_tokens: int | None = 512,
    top_p: float = 0.95,
    seed: int | None = None,
    read: Callable[[str], str] = input,
    console: Console | None = None,
) -> None:
    """Ask with `read(prompt)` and stream answers to `console` until /quit or the end of the input."""
    console = console or Console(highlight=False)
    console.print(t("Write a message. {reset} begins anew, {quit} leaves.", reset="/reset", quit="/quit"), style="dim")
    opening: tuple[Message, ...] = (Message("system", system),) if system else ()
    messages: tuple[Message, ...] = opening
    while True:
        try:
            text = read("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text in ("/quit", "/exit", "/q"):
            return
        if text == "/reset":
            messages = opening
            console.print(t("A new conversation."), style="dim")
        elif text.startswith("/"):
            console.print(t("{command} is not known: /reset, /quit", command=escape(text)), style="yellow")
        elif text:
            asked = (*messages, Message("user", text))
            request = Request(
                messages=asked, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
            )
            messages = _answer(engine, request, asked, console) or messages


def _answer(
    engine: Engine, request: Request, asked: tuple[Message, ...], console: Console
) -> tuple[Message, ...] | None:
    """Stream one answer; the conversation with it, or None when there was an error. Ctrl-C keeps what has come."""
    text = ""
    stream: Iterator[Delta] = iter(())
    try:
        request, left_out = fitted(engine, request)
        if left_out:
            console.print(t("The earliest messages no longer fit and are left out."), style="dim")
        stream = engine.stream(request)
        for delta in stream:
            text += delta.text
            console.print(delta.text, end="", markup=False, soft_wrap=True)
        console.print()
    except KeyboardInterrupt:
        getattr(stream, "close", lambda: None)()
        console.print(" " + t("(stopped)"), style="dim")
    except FledgeError as error:
        console.print(str(error), style="red", markup=False)
        return None
    return (*asked, Message("assistant", text))
