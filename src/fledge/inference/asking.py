"""How an engine in this process is asked: `generate` and `stream`, told in terms of tickets."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from fledge.core.errors import FledgeError
from fledge.inference.answer import Collector, Ticket
from fledge.inference.engine import Delta, Listen, Request, Result


class Asking:
    """`submit`, `generate` and `stream` for an engine that makes tickets of requests and takes them in."""

    _ticket: Callable[[Request, Listen], Ticket]
    """raises FledgeError when the request cannot be"""
    _post: Callable[[list[Ticket]], None]
    """lets them in together"""

    def submit(self, request: Request, listen: Listen) -> Ticket:
        """Start a request. Raises FledgeError when its prompt is empty or leaves no room in the context."""
        ticket = self._ticket(request, listen)
        self._post([ticket])
        return ticket

    def stream(self, request: Request) -> Iterator[Delta]:
        """The deltas of a request as they come; closing the iterator cancels it."""
        deltas: queue.SimpleQueue[Delta | FledgeError] = queue.SimpleQueue()
        ticket = self.submit(request, deltas.put)
        try:
            unfinished = request.n
            while unfinished:
                delta = deltas.get()
                if isinstance(delta, FledgeError):
                    raise delta
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            ticket.cancel()

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All answers, in order. All requests enter at once: on an idle engine the batches are always the same."""
        waiting = threading.Semaphore(0)
        entries: list[tuple[Ticket, Collector] | FledgeError] = []
        for request in requests:
            collector = Collector(request, waiting.release)
            try:
                entries.append((self._ticket(request, collector), collector))
            except FledgeError as error:
                entries.append(error)
        tickets = [entry[0] for entry in entries if not isinstance(entry, FledgeError)]
        self._post(tickets)
        try:
            for _ in tickets:
                waiting.acquire()
        except BaseException:  # Ctrl-C: do not go on computing what nobody waits for
            for ticket in tickets:
                ticket.cancel()
            raise
        return [
            Result(error=entry) if isinstance(entry, FledgeError) else entry[1].result(entry[0]) for entry in entries
        ]
