"""`stream` and `generate` for an engine that can `submit`: the two ways of waiting, the same for every engine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from fledge.core.errors import FledgeError
from fledge.inference.engine import Choice, Delta, Handle, Listen, Request, Result

AHandle = TypeVar("AHandle", bound=Handle)


def stream(submit: Callable[[Request, Listen], Handle], request: Request) -> Iterator[Delta]:
    """The deltas of a request as they come; closing the iterator cancels it, an error is raised from it."""
    deltas: queue.SimpleQueue[Delta | FledgeError] = queue.SimpleQueue()
    handle = submit(request, deltas.put)
    try:
        unfinished = request.n
        while unfinished:
            delta = deltas.get()
            if isinstance(delta, FledgeError):
                raise delta
            unfinished -= delta.finish_reason is not None
            yield delta
    finally:
        handle.cancel()


def generate(
    submit: Callable[[Request, Listen], AHandle],
    requests: Sequence[Request],
    begin: Callable[[list[AHandle]], None] = lambda handles: None,
) -> list[Result]:
    """All answers, in the order of the requests; an error is the result of its own request only. `begin` is given all
    handles at once, for engines whose requests wait until then."""
    waiting = threading.Semaphore(0)
    entries: list[tuple[AHandle, _Whole] | FledgeError] = []
    for request in requests:
        whole = _Whole(request, waiting.release)
        try:
            entries.append((submit(request, whole), whole))
        except FledgeError as error:
            entries.append(error)
    handles = [entry[0] for entry in entries if not isinstance(entry, FledgeError)]
    begin(handles)
    try:
        for _ in handles:
            waiting.acquire()
    except BaseException:  # Ctrl-C: do not go on asking for what nobody waits for
        for handle in handles:
            handle.cancel()
        raise
    return [Result(error=entry) if isinstance(entry, FledgeError) else entry[1].result(entry[0]) for entry in entries]


class _Whole:
    """Listens to one request and puts its answers together; `done` is called once, when nothing more will come."""

    def __init__(self, request: Request, done: Callable[[], None]) -> None:
        self._answers: list[list[Delta]] = [[] for _ in range(request.n)]
        self._error: FledgeError | None = None
        self._open, self._done = request.n, done

    def __call__(self, delta: Delta | FledgeError) -> None:
        if isinstance(delta, FledgeError):
            self._error, self._open = delta, 0
        else:
            self._answers[delta.index].append(delta)
            self._open -= delta.finish_reason is not None
        if self._open == 0:
            self._done()

    def result(self, handle: Handle) -> Result:
        if self._error is not None:
            return Result(prompt_tokens=handle.prompt_tokens, error=self._error)
        read = getattr(handle, "prompt_logprobs", ())
        return Result(tuple(_choice(deltas) for deltas in self._answers), handle.prompt_tokens, read)


def _choice(deltas: Sequence[Delta]) -> Choice:
    return Choice(
        "".join(delta.text for delta in deltas),
        tuple(id for delta in deltas for id in delta.token_ids),
        next(delta.finish_reason for delta in reversed(deltas) if delta.finish_reason),
        tuple(item for delta in deltas for item in delta.logprobs),
    )
