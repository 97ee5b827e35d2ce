"""What engines in this process share: how they are asked, in terms of tickets, their tokens, and their worker's end."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from fledge.core.errors import FledgeError
from fledge.core.language import t
from fledge.inference.answer import Collector, Ticket
from fledge.inference.engine import Delta, Listen, Request, Result
from fledge.inference.engines import blocking

LINGER = 2.0
"""seconds after which an idle worker ends, so that an engine that nobody refers to any more frees its model"""
_OPEN: weakref.WeakSet[Asking] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread inside torch must not be there any more when the interpreter goes down."""
    for engine in list(_OPEN):
        engine.close()


class Asking:
    """An engine that makes tickets of requests and hands them to a worker thread, which runs while there is work."""

    _text: Any
    """the tokenizer's own copy for plain text: never changed, so that threads may share it"""
    _work: Callable[[], None]
    """what the worker does until nobody asks any more, or `_closed`"""
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
        return blocking.stream(self.submit, request)

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

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: control spellings stay text, no special tokens are added."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; with `special` control tokens are spelled out, else left out."""
        return str(self._text.decode(list(ids), skip_special_tokens=not special))

    # ---- the worker's life

    def _open(self) -> None:
        """From now on there may be a worker."""
        self._news = threading.Condition()
        self._closed = False
        self._worker: threading.Thread | None = None
        _OPEN.add(self)

    def _see_worker(self) -> None:
        """See that there is a worker. `_news` is held. Raises FledgeError when the engine is closed."""
        if self._closed:
            raise FledgeError(t("the engine is closed"))
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
            self._worker.start()

    def close(self) -> None:
        """End all requests as cancelled and let the worker go."""
        with self._news:
            self._closed = True
            worker = self._worker
            self._news.notify()
        if worker is not None:
            worker.join()
        _OPEN.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
