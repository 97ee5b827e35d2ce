"""`fledge chat`: a conversation in the terminal, streamed. /reset begins anew, /quit leaves, Ctrl-C stops an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from rich.console import Console
from rich.markup import escape

from fledge.core.errors import FledgeError
from fledge.core.language import t
from fledge.inference.engine import Delta, Engine, PromptTooLong, Request
from fledge.inference.history import fitted
from fledge.inference.retrieval.answering import Answer, GroundedPrompt, Searches
from fledge.inference.retrieval.reading import Passage
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
    search: Searches | None = None,
) -> None:
    """Ask with `read(prompt)` and stream answers to `console` until /quit or the end of the input. With `search` the
    model is shown what each message finds, and the passages that it cites stand below its answer."""
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
            messages = _answer(engine, request, asked, console, search) or messages


def _answer(
    engine: Engine, request: Request, asked: tuple[Message, ...], console: Console, search: Searches | None
) -> tuple[Message, ...] | None:
    """Stream one answer; the conversation with it, or None when there was an error. Ctrl-C keeps what has come."""
    text = ""
    stream: Iterator[Delta] = iter(())
    try:
        request, left_out, passages = _grounded(engine, request, search)
        if left_out:
            console.print(t("The earliest messages no longer fit and are left out."), style="dim")
        if search is not None and not passages:
            console.print(t("nothing was found"), style="dim")
        stream = engine.stream(request)
        for delta in stream:
            text += delta.text
            console.print(delta.text, end="", markup=False, soft_wrap=True)
        console.print()
        if passages:
            show_sources(Answer(asked[-1].content, text, passages), console)
    except KeyboardInterrupt:
        getattr(stream, "close", lambda: None)()
        console.print(" " + t("(stopped)"), style="dim")
    except FledgeError as error:
        console.print(str(error), style="red", markup=False)
        return None
    return (*asked, Message("assistant", text))


def _grounded(engine: Engine, request: Request, search: Searches | None) -> tuple[Request, int, tuple[Passage, ...]]:
    """The request as it fits, how many earlier messages were left out, and the passages put before its last message:
    the last ones are left out while that message alone is too long. Only this request holds them, not the talk."""
    *before, question = request.messages or ()
    passages = search.search(question.content) if search else []
    while passages:
        prompt = GroundedPrompt.of(question.content, passages)
        shown = Message("user", f"{prompt.instruction}\n\n{prompt.body}")
        try:
            return *fitted(engine, replace(request, messages=(*before, shown))), tuple(passages)
        except PromptTooLong:
            passages = passages[:-1]
    return *fitted(engine, request), ()


def show_sources(answer: Answer, console: Console) -> None:
    """The passages that an answer cites, and what is wrong with its citations."""
    if answer.sources:
        console.print()
    for line in answer.sources:
        console.print(line, style="cyan", markup=False)
    for line in answer.problems:
        console.print(f"! {line}", style="yellow", markup=False)
