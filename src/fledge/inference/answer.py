"""A request on its way (`Ticket`) and each of its answers (`Answer`): how tokens become deltas, and when it ends."""

from __future__ import annotations

from collections.abc import Callable

from fledge.core.errors import FledgeError
from fledge.inference.blocks import Table
from fledge.inference.constraint import Guide
from fledge.inference.detokenize import Decoder, Detokenizer, StopStrings
from fledge.inference.engine import Delta, FinishReason, Listen, Request, TokenLogprob, told
from fledge.inference.ranking import Ranking
from fledge.inference.sampling import Floats, Sampling, logprob_of, ranked
from fledge.inference.speculation import Draft, Guesser, accept


class Answer:
    """One answer as it grows. `ids` are the prompt's and its own: what has to be in the cache to go on."""

    def __init__(self, ticket: Ticket, index: int, decoder: Decoder) -> None:
        self.ticket, self.index = ticket, index
        self.ids = list(ticket.prompt_ids)
        guide = ticket.guide.fork() if ticket.guide is not None else None
        self.sampling = Sampling.of(ticket.request, ticket.prompt_ids, index, guide)
        self.guesser = Guesser() if ticket.request.speculate else None
        self.finished = self.failed = False
        self.arrival = 0
        """the scheduler's count: who came first"""
        self.tables: list[Table] = []
        """the blocks of its sequences: one, or as many as there are beams; filled in by the scheduler"""
        self.draft: list[int] = []
        """tokens guessed to follow, to be checked by the next step"""
        self._guess = Draft()
        self._detokenizer = Detokenizer(decoder)
        self._stops = StopStrings(ticket.request.stop)

    @property
    def table(self) -> Table:
        """The blocks of its only sequence."""
        return self.tables[0]

    @property
    def room(self) -> int:
        """The most tokens that it may still get."""
        return self.ticket.limit + len(self.ticket.prompt_ids) - len(self.ids)

    def propose(self, guess: Draft) -> None:
        """Let the next step check a guess."""
        self._guess, self.draft = guess, guess.ids

    def extend(self, rows: Floats) -> int:
        """Take the next tokens from the logits (1 + len(draft), V) after its last token and its draft.

        Returns how many tokens of the draft stayed. Raises FledgeError where its constraint leaves no way to go on.
        """
        guess, self.draft = (self._guess if self.draft else Draft()), []
        kept = accept(rows, guess, self.sampling, self._took)
        if self.guesser is not None:
            self.guesser.saw(guess, kept)
        return kept

    def _took(self, token: int, row: Floats) -> bool:
        request = self.ticket.request
        count = 0 if request.logprobs is None and ranked(request) else request.logprobs
        self.take(token, None if count is None else logprob_of(row, token, count))
        return not self.finished

    def put_back(self) -> None:
        """Hold no blocks any more; what is there so far will be read again."""
        for table in self.tables:
            table.release()
        self.tables = [Table(self.table.pool, self.ids, self.table.adapter, self.table.key)]
        self.draft = []

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """Append a sampled token and tell the listener what is certain of its text."""
        self.ids.append(token)
        self.sampling.took(token)
        ended = token in self.ticket.stop_ids
        text = "" if ended else self._stops.add(self._detokenizer.add([token]))
        ended = ended or (self.sampling.guide is not None and self.sampling.guide.complete)
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
        decoder: Decoder, listen: Listen, wake: Callable[[], None], guide: Guide | None = None,
    ) -> None:  # fmt: skip
        """`limit`: the most new tokens of an answer. `wake` tells the engine that the request has ended early.
        `guide`: what its answers must be, of which each takes a copy."""
        self.request, self.prompt_ids, self.stop_ids, self.limit = request, prompt_ids, stop_ids, limit
        self.guide = guide
        self._listen: Listen = Ranking(request, listen) if ranked(request) else listen
        self._wake = wake
        self.prompt_tokens = len(prompt_ids)
        self.cache_key = request.adapter
        """what keeps its blocks apart from those of the same tokens read by something else"""
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        """of every token of the prompt, where the request wants them and the prompt has been read"""
        self.cancelled = False
        self.answers = [Answer(self, index, decoder) for index in range(request.best_of or request.n)]

    def cancel(self) -> None:
        self.cancelled = True
        self._wake()

    def end(self) -> None:
        """End as cancelled every answer that goes on. The engine's thread does this."""
        for answer in self.answers:
            if not answer.finished:
                answer.cancel()

    @property
    def finished(self) -> bool:
        """Whether no answer goes on."""
        return all(answer.finished for answer in self.answers)

    def fail(self, error: FledgeError) -> None:
        """End all its answers with one error."""
        if not self.finished:
            for answer in self.answers:
                answer.finished = answer.failed = True
            self.tell(error)
            self._wake()

    def tell(self, delta: Delta | FledgeError) -> None:
        """Pass it on. Whose listener breaks is cancelled."""
        if not told(self._listen, delta):
            self._listen = lambda _: None
            self.cancel()
