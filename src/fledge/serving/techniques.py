"""Prompting techniques behind the chat endpoint: `extra_body={"technique": {"use": "cot"}}`.

The answer is the technique's answer alone. A reply carries one field more than OpenAI's, `technique`:

    whole      {"use": "cot", "text": what the answer was taken from, "trace": [step, …]}
    in chunks  {"use": "cot", "trace": [step]} as soon as a step is done, with an empty delta; then the answer in one
               delta, and with the last chunk {"use": "cot", "text": …}. Where the model's words are the answer, as with
               "role" or "few_shot", they come as they are written, and the steps behind them.

`usage` counts the tokens of all steps. Sampling options hold for every step, `max_tokens` too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import Choice, Delta, Engine, Request, Result
from fledge.inference.prompting import Outcome, Question, Step, Technique
from fledge.inference.prompting.tools import Calculator, Tool
from fledge.serving.errors import describe
from fledge.serving.metrics import Timing
from fledge.serving.replies import ChatReply, event
from fledge.serving.schema import ChatRequest
from fledge.serving.service import Answers, Service

TOOLS: Mapping[str, Tool] = {"calculator": Calculator()}
"""What clients may use where the operator has not said more."""


def checked(body: ChatRequest, allowed: Mapping[str, Tool]) -> tuple[Technique, Request, Question]:
    """The technique, how to sample, and the question. Raises FledgeError for what does not go with a technique."""
    assert body.technique is not None
    base = body.request()
    for name, given in (
        ("n", base.n != 1),
        ("logprobs", base.logprobs is not None or base.prompt_logprobs is not None),
        ("best_of", base.best_of is not None),
        ("response_format", base.constraint is not None),
    ):
        if given:
            fix = t("use the technique format") if name == "response_format" else ""
            raise FledgeError(Problem(t("{name} does not go with a technique", name=name), name, fix=fix))
    if guarded := body.technique.guarded_settings():
        raise FledgeError(Problem(t("{name} cannot be set by a client", name=guarded[0]), f"technique.{guarded[0]}"))
    if missing := sorted(body.technique.needs() - set(allowed)):
        what = t('there is no tool "{name}" here', name=missing[0])
        raise FledgeError(Problem(what, "technique.tools", allowed=", ".join(sorted(allowed))))
    return body.technique, base, Question.of(base.messages or ())


class Thinking:
    """One technique on its way: an iterator over what it does; `outcome` is there when it has ended."""

    def __init__(
        self, engine: Engine, technique: Technique, base: Request, question: Question,
        tools: Mapping[str, Tool], timing: Timing,
    ) -> None:  # fmt: skip
        self.technique, self._engine, self._timing = technique, engine, timing
        self._heard: list[Step] = []
        self._results: list[Result] | None = None  # of the round before
        self._program = technique.solving(question, base, tools=tools, listen=self._heard.append)
        self.outcome: Outcome | None = None

    async def told(self) -> AsyncGenerator[Step | str, None]:
        """Every step as soon as it is done, and pieces of the answer where they can be known before its end. Closing
        the iterator cancels what the engine is doing."""
        streams, written = self.technique.streams(), Stripped()
        while self.outcome is None:
            requests = await asyncio.to_thread(self._go_on)  # a tool may take its time
            for step in self._heard:
                yield step
            self._heard.clear()
            self._timing.finished = requests is None
            if requests is not None:
                async with aclosing(self._ask(requests)) as deltas:
                    async for delta in deltas:
                        if streams and (text := written.add(delta.text)):
                            yield text

    def _go_on(self) -> list[Request] | None:
        try:
            return next(self._program) if self._results is None else self._program.send(self._results)
        except StopIteration as end:
            self.outcome = end.value
            return None

    async def _ask(self, requests: Sequence[Request]) -> AsyncGenerator[Delta, None]:
        """One round, whose results are kept. What goes wrong is handed to the technique, which names the step."""
        answers = Answers(self._engine, requests, self._timing)
        deltas: list[list[Delta]] = [[] for _ in requests]
        try:
            answers.begin()
            async for delta in answers:
                deltas[delta.index].append(delta)
                yield delta
        except FledgeError as error:
            self._results = [Result(error=error)] * len(requests)
            return
        finally:
            answers.cancel()
        read = answers.each_prompt_tokens
        self._timing.finished = False  # a round has ended, not the whole
        self._results = [Result((_whole(some),), tokens) for some, tokens in zip(deltas, read, strict=True)]


class Stripped:
    """A text that comes in pieces, without the white space at its ends: a technique's answer has none."""

    def __init__(self) -> None:
        self.text = ""
        """what has been given out"""
        self._space = ""

    def add(self, piece: str) -> str:
        """What can be given out now."""
        piece = self._space + piece if self.text else piece.lstrip()
        sure = piece.rstrip()
        self._space = piece[len(sure) :]
        self.text += sure
        return sure


def _whole(deltas: Sequence[Delta]) -> Choice:
    ids = tuple(id for delta in deltas for id in delta.token_ids)
    return Choice("".join(delta.text for delta in deltas), ids, deltas[-1].finish_reason or "stop")


class TechniqueReply(ChatReply):
    """A chat reply with a trace."""

    def begun(self) -> str:
        """What opens the stream."""
        return self.chunk(self.first(0))

    def step(self, use: str, step: Step) -> str:
        """A step of the trace, in a chunk without text."""
        return self._with({"use": use, "trace": [step.to_json()]}, Delta())

    def text(self, piece: str) -> str:
        """A piece of the answer."""
        return self.chunk(self.part(0, Delta(piece)))

    def ended(self, use: str, outcome: Outcome) -> str:
        """The end."""
        return self._with({"use": use, "text": outcome.text}, Delta(finish_reason=_finish(outcome)))

    def all(self, use: str, outcome: Outcome) -> dict[str, Any]:
        """The reply in one piece."""
        answer = Delta(outcome.answer, finish_reason=_finish(outcome))
        whole = self.complete([[answer]], outcome.prompt_tokens, outcome.completion_tokens)
        told = {"use": use, "text": outcome.text, "trace": [step.to_json() for step in outcome.trace]}
        return whole | {"technique": told}

    def _with(self, technique: dict[str, Any], delta: Delta) -> str:
        choice = self.part(0, delta)
        if not delta.text:
            choice["delta"] = {}
        more = {"usage": None} if self.include_usage else {}
        return event(self._object(self.chunk_kind, [choice], technique=technique, **more))


def _finish(outcome: Outcome) -> Any:
    """Why the last answer of the model ended."""
    return next((step.finish for step in reversed(outcome.trace) if step.finish), "stop")


async def whole(service: Service, body: ChatRequest, tools: Mapping[str, Tool]) -> dict[str, Any]:
    """The reply to a request with a technique."""
    name, engine = service.engine(body.model)
    technique, base, question = checked(body, tools)
    with service.metrics.request(name) as timing:
        thinking = Thinking(engine, technique, base, question, tools, timing)
        async with aclosing(thinking.told()) as told:
            async for _ in told:
                pass
        assert thinking.outcome is not None
        return TechniqueReply(name, engine).all(technique.name, thinking.outcome)


async def chunks(service: Service, body: ChatRequest, tools: Mapping[str, Tool]) -> AsyncGenerator[str, None]:
    """The events of a reply that is streamed. What fails before the first step is raised; later it ends the stream."""
    name, engine = service.engine(body.model)
    technique, base, question = checked(body, tools)
    reply = TechniqueReply(name, engine, body.include_usage)
    opened, streamed = False, ""
    try:
        with service.metrics.request(name) as timing:
            thinking = Thinking(engine, technique, base, question, tools, timing)
            async with aclosing(thinking.told()) as told:
                async for item in told:
                    if not opened:
                        yield reply.begun()
                    opened = True
                    if isinstance(item, str):
                        streamed += item
                    yield reply.text(item) if isinstance(item, str) else reply.step(technique.name, item)
    except FledgeError as error:
        if not opened:
            raise
        yield event(describe(error)[1])
        return
    outcome = thinking.outcome
    assert outcome is not None
    if rest := outcome.answer.removeprefix(streamed):
        yield reply.text(rest)
    yield reply.ended(technique.name, outcome)
    if reply.include_usage:
        yield reply.usage_chunk(outcome.prompt_tokens, outcome.completion_tokens)
    yield "data: [DONE]\n\n"
