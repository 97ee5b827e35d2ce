"""The thread that owns a model: it is handed requests and functions, repeats rounds, and ends when nobody asks."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Self, TypeVar

import torch

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference import kernels
from fledge.inference.answer import Ticket

T = TypeVar("T")
log = logging.getLogger(__name__)

LINGER = 2.0
"""seconds after which an idle worker ends, so that an engine that nobody refers to any more frees its model"""
_OPEN: weakref.WeakSet[Working] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread inside torch must not be there any more when the interpreter goes down."""
    for engine in list(_OPEN):
        engine.close()


class Working(ABC):
    """An engine with a worker: everything is computed there, requests in rounds and functions between two of them."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._inbox: deque[Ticket | Callable[[], None]] = deque()
        self._closed = False
        self._worker: threading.Thread | None = None
        _OPEN.add(self)

    # ---- what each engine says: the worker alone calls these

    @abstractmethod
    def _busy(self) -> bool:
        """Whether a request that was let in has not ended: rounds are repeated."""

    @abstractmethod
    def _tickets(self) -> Iterable[Ticket]:
        """Those requests."""

    @abstractmethod
    def _enter(self, ticket: Ticket) -> None:
        """Let a request in."""

    @abstractmethod
    def _round(self) -> None:
        """Carry the requests a little further (there may be none)."""

    @abstractmethod
    def _broken(self, error: FledgeError) -> None:
        """A round has failed: end the requests that it computed with `error`, and forget what is half done."""

    # ---- handing over

    def _post(self, items: Iterable[Ticket | Callable[[], None]]) -> None:
        """Hand them over together. Raises FledgeError when the engine is closed."""
        kernels.rest()  # the worker computes now
        with self._news:
            if self._closed:
                raise FledgeError(t("the engine is closed"))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
                self._worker.start()
            self._inbox.extend(items)
            self._news.notify()

    def _call(self, function: Callable[[], T]) -> T:
        """The value of `function`, computed by the worker between two rounds."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._post([run])
        return future.result()

    def _wake(self) -> None:
        """Some request has ended early: it was cancelled or failed."""
        with self._news:
            self._news.notify()

    # ---- the worker

    @torch.inference_mode()
    def _work(self) -> None:
        while self._wait():
            self._take()
            try:
                self._round()
            except Exception as error:  # out of memory, a broken model: the requests fail, the engine lives on
                log.exception("a round of the engine failed")
                what = t("the model could not be computed")
                self._broken(FledgeError(Problem(what, found=f"{type(error).__name__}: {error}")))

    def _wait(self) -> bool:
        """Until there is work; False when the worker is to end, because nobody asks or because it was closed."""
        busy = self._busy()
        if not busy:
            kernels.rest()  # whoever asked may compute meanwhile
        with self._news:
            if not self._news.wait_for(lambda: self._closed or self._inbox or busy, LINGER):
                self._worker = None
                return False
        if self._closed:
            for ticket in list(self._tickets()):
                ticket.end()
            self._take()
        return not self._closed

    def _take(self) -> None:
        """Let in what was handed over; once closed, requests end at the door, and whoever waits for a value gets it."""
        with self._news:
            items = list(self._inbox)
            self._inbox.clear()
        for item in items:
            if callable(item):
                item()
            elif item.cancelled or self._closed:
                item.end()
            else:
                self._enter(item)

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
