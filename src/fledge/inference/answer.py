"""A request on its way (`Ticket`) and each of its answers (`Answer`): how tokens become deltas, and when it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fledge.core.errors import FledgeError
from fledge.inference.detokenize import Decoder, Detokenizer, StopStrings
from fledge.inference.engine import Choice, Delta, FinishReason, Listen, Request, Result, TokenLogprob
from fledge.inference.sampling import Sampling

log = logging.getLogger(__name__)


class Answer:
    """One answer as it grows. `ids` are the prompt's and its own: what has to be in the cache to go on."""

    def __init__(self, ticket: Ticket, index: int, decoder: Decoder) -> None:
        self.ticket, self.index = ticket, index
        self.ids = list(ticket.prompt_ids)
        self.sampling = Sampling.of(ticket.request, ticket.prompt_ids, index)
        self.finished = False
        self.arrival = 0  # the scheduler's count: who came first
        self._detokenizer = Detokenizer(decoder)
        self._stops = StopStrings(ticket.request.stop)

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """Append a sampled token and tell the listener what is certain of its text."""
        self.ids.append(token)
        self.sampling.took(token)
        ended = token in self.ticket.stop_ids
        text = "" if ended else self._stops.add(self._detokenizer.add([token]))
        full = len(self.ids) - len(self.ticket.prompt_ids) >= self.ticket.limit
        if (ended or full) and not self._stops.stopped:
            text += self._stops.add(self._detokenizer.flush()) + self._stops.flush()
        reason: FinishReason | None = "stop" if ended or self._stops.stopped else "length" if full else None
        self._tell(Delta(text, (token,), reason, (logprob,) if logprob else (), self.index))

    def cancel(self) -> None:
        """End here."""
        self._tell(Delta(finish_reason="cancelled", index=self.index))

    def _tell(self, delta: Delta) -> None:
        self.finished = delta.finish_reason is not None
        self.ticket.tell(delta)


class Ticket:
    """A request on its way: the `Handle` of the native engine."""

    def __init__(
        self, request: Request, prompt_ids: list[int], stop_ids: frozenset[int], limit: int,
        decoder: Decoder, listen: Listen, wake: Callable[[], None],
    ) -> None:  # fmt: skip
        """`limit`: the most new tokens of an answer. `wake` tells the engine that there is something to do."""
        self.request, self.prompt_ids, self.stop_ids, self.limit = request, prompt_ids, stop_ids, limit
        self._listen, self._wake = listen, wake
        self.prompt_tokens = len(prompt_ids)
        self.cancelled = False
        self.answers = [Answer(self, index, decoder) for index in range(request.n)]

    def cancel(self) -> None:
        self.cancelled = True
        self._wake()

    @property
    def finished(self) -> bool:
        """Whether no answer goes on."""
        return all(answer.finished for answer in self.answers)

    def fail(self, error: FledgeError) -> None:
        """End all its answers with one error."""
        if not self.finished:
            for answer in self.answers:
                answer.finished = True
            self.tell(error)

    def tell(self, delta: Delta | FledgeError) -> None:
        """Pass it on. A listener that breaks (its loop is closed, its client is gone) ends its own request only."""
        try:
            self._listen(delta)
        except Exception:
            log.exception("a listener failed")
            self.cancelled, self._listen = True, lambda _: None


class Collector:
    """Listens to one request and puts its whole answers together."""

    def __init__(self, request: Request, done: Callable[[], None] = lambda: None) -> None:
        """`done` is called once, in the engine's thread, when nothing more will come."""
        self.error: FledgeError | None = None
        self._deltas: list[list[Delta]] = [[] for _ in range(request.n)]
        self._open, self._done = request.n, done

    def __call__(self, delta: Delta | FledgeError) -> None:
        if isinstance(delta, FledgeError):
            self.error, self._open = delta, 0
        else:
            self._deltas[delta.index].append(delta)
            self._open -= delta.finish_reason is not None
        if self._open == 0:
            self._done()

    def result(self, prompt_tokens: int) -> Result:
        """What came, whole."""
        if self.error is not None:
            return Result(prompt_tokens=prompt_tokens, error=self.error)
        return Result(tuple(_whole(deltas) for deltas in self._deltas), prompt_tokens)


def _whole(deltas: list[Delta]) -> Choice:
    return Choice(
        text="".join(d.text for d in deltas),
        token_ids=tuple(id for d in deltas for id in d.token_ids),
        finish_reason=next(d.finish_reason for d in reversed(deltas) if d.finish_reason),
        logprobs=tuple(p for d in deltas for p in d.logprobs),
    )
