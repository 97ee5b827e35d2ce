"""The models that are served, by name: the one way in for the API and for the chat page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.inference.engine import Delta, Engine, Handle, PromptTooLong, Request, TokenLogprob
from fledge.inference.engines.errors import EngineError
from fledge.serving.metrics import Metrics, Timing


class UnknownModel(FledgeError):
    """There is no model of that name here."""


class EngineFailed(FledgeError):
    """The request was right; its computation was not, or the server is going down."""


class Service:
    """Engines by the name under which the API knows them, and the numbers of what they do."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = dict(engines)
        self.metrics = Metrics(self.engines)
        self.started = int(time.time())

    def engine(self, model: str | None) -> tuple[str, Engine]:
        """The name and engine of `model`; without one, the first. Raises UnknownModel."""
        name = next(iter(self.engines)) if model is None else model
        if name not in self.engines:
            raise UnknownModel(
                Problem(
                    t('there is no model "{name}" here', name=name),
                    "model",
                    allowed=listing(list(self.engines)),
                    fix=did_you_mean(name, self.engines),
                )
            )
        return name, self.engines[name]

    @asynccontextmanager
    async def answer(self, model: str | None, *requests: Request) -> AsyncIterator[Answers]:
        """The answers to some requests while they are written. Leaving the block cancels what is unfinished."""
        name, engine = self.engine(model)
        with self.metrics.request(name) as timing:
            answers = Answers(engine, requests, timing)
            try:
                answers.begin()
                yield answers
            finally:
                answers.cancel()


class Answers:
    """The deltas of one call's requests, brought from the engine's thread into the event loop.

    The answers are numbered through: those of the first request, then those of the second, …
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], timing: Timing) -> None:
        self.count = sum(request.n for request in requests)
        self.completion_tokens = 0
        self._engine, self._requests, self._timing = engine, requests, timing
        self._deltas: asyncio.Queue[Delta | FledgeError] = asyncio.Queue()
        self._handles: list[Handle] = []
        self._unfinished, self._known = self.count, 0

    def begin(self) -> None:
        """Submit the requests. Raises FledgeError when one of them cannot be."""
        loop, first = asyncio.get_running_loop(), 0
        for request in self._requests:

            def listen(delta: Delta | FledgeError, first: int = first) -> None:
                if isinstance(delta, Delta) and first:
                    delta = replace(delta, index=first + delta.index)
                loop.call_soon_threadsafe(self._deltas.put_nowait, delta)

            self._handles.append(self._engine.submit(request, listen))
            first += request.n
        self._known = self.prompt_tokens
        self._timing.read(self._known)

    @property
    def prompt_tokens(self) -> int:
        """The tokens of the prompts; of an engine behind a URL they are known when it has told."""
        return sum(self.each_prompt_tokens)

    @property
    def each_prompt_tokens(self) -> list[int]:
        """The same, request by request."""
        return [handle.prompt_tokens for handle in self._handles]

    @property
    def prompt_logprobs(self) -> list[Sequence[TokenLogprob | None]]:
        """Those of each answer's prompt, where they were asked for and all is finished."""
        pairs = zip(self._requests, self._handles, strict=True)
        return [getattr(handle, "prompt_logprobs", ()) for request, handle in pairs for _ in range(request.n)]

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> Delta:
        """The next delta of any of the answers. Raises EngineFailed when there will be none."""
        if not self._unfinished:
            raise StopAsyncIteration
        delta = await self._deltas.get()
        if isinstance(delta, FledgeError):
            raise delta if isinstance(delta, (PromptTooLong, EngineError)) else EngineFailed(*delta.problems)
        if delta.finish_reason == "cancelled":
            raise EngineFailed(t("the server is going down"))
        self._unfinished -= delta.finish_reason is not None
        self.completion_tokens += len(delta.token_ids)
        self._timing.wrote(len(delta.token_ids), finished=not self._unfinished)
        if not self._unfinished:
            self._timing.read(self.prompt_tokens - self._known)
        return delta

    def cancel(self) -> None:
        """Stop writing what is unfinished."""
        if self._unfinished:
            for handle in self._handles:
                handle.cancel()
