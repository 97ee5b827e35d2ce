"""A beam search on its way through the scheduler: one sequence of blocks for each beam, one answer to wait for."""

from __future__ import annotations

from fledge.inference.answer import Answer, Ticket
from fledge.inference.beam import BeamSearch, Finished
from fledge.inference.blocks import Table
from fledge.inference.detokenize import Decoder, Detokenizer, StopStrings
from fledge.inference.engine import Delta
from fledge.inference.sampling import Floats


class BeamAnswer(Answer):
    """All answers of a request with beams; they are told together when the search is over."""

    def __init__(self, ticket: Ticket, decoder: Decoder) -> None:
        super().__init__(ticket, 0, decoder)
        self._decoder, self.guesser = decoder, None
        self._search = self._begin()

    def _begin(self) -> BeamSearch:
        ticket = self.ticket
        return BeamSearch(self.sampling.fork(), self._ends, len(ticket.stop_ids), ticket.limit)

    def _ends(self, tokens: list[int]) -> bool:
        if tokens[-1] in self.ticket.stop_ids:
            return True
        stops = self.ticket.request.stop
        return bool(stops) and any(stop in self._decoder.decode(tokens) for stop in stops)

    def extend(self, rows: Floats) -> int:
        """Take the logits (beams, V) of the next tokens. There are no guesses to keep: returns 0."""
        self._search.step(list(rows))
        if self._search.done:
            for index, text in enumerate(self._search.results()):
                self.ticket.tell(self._whole(index, text))
            self.finished = True
        else:
            self._branch()
        return 0

    def _branch(self) -> None:
        """Give every beam the blocks of the one that it goes on from."""
        parents = self.tables
        for table in parents:
            table.advance(len(table.ids))
        self.tables = []
        for beam in self._search.beams:
            parent = parents[beam.parent]
            table = Table(parent.pool, [*parent.ids, beam.tokens[-1]], parent.adapter, parent.key)
            table.fork(parent)
            self.tables.append(table)
        for table in parents:
            table.release()

    def _whole(self, index: int, text: Finished) -> Delta:
        ended = text.tokens[-1] in self.ticket.stop_ids
        detokenizer, stops = Detokenizer(self._decoder), StopStrings(self.ticket.request.stop)
        words = stops.add(detokenizer.add(text.tokens[: len(text.tokens) - ended]))
        if not stops.stopped:
            words += stops.add(detokenizer.flush()) + stops.flush()
        return Delta(words, tuple(text.tokens), text.reason, tuple(text.logprobs), index)

    def put_back(self) -> None:
        """Hold no blocks any more; the search begins anew (and comes to the same end)."""
        super().put_back()
        self._search = self._begin()

    def cancel(self) -> None:
        """End here."""
        for index in range(self.ticket.request.n):
            self.ticket.tell(Delta(finish_reason="cancelled", index=index))
        self.finished = True
