"""An engine that says what a test has written for it, and keeps what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fledge.core.errors import FledgeError
from fledge.inference.engine import Choice, Request, Result

Says = Callable[[str, Request], str]


def told(request: Request) -> str:
    """What a model reads: the text, or the last message."""
    return request.text if request.text is not None else request.messages[-1].content  # type: ignore[index]


class Scripted:
    """Answers from a list, in order, or from a function of what is asked. A token is a character, in and out."""

    def __init__(self, says: Says | Sequence[str | FledgeError]) -> None:
        self._says = says if callable(says) else None
        self._list = [] if callable(says) else list(says)
        self.batches: list[list[Request]] = []

    @property
    def asked(self) -> list[Request]:
        return [request for batch in self.batches for request in batch]

    @property
    def left(self) -> int:
        """Answers that nobody asked for."""
        return len(self._list)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        self.batches.append(list(requests))
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Result:
        assert request.n == 1 and request.logprobs is None
        text = self._says(told(request), request) if self._says else self._list.pop(0)
        if isinstance(text, FledgeError):
            return Result(error=text)
        whole = request.text or "".join(message.content for message in request.messages or ())
        end = min((text.find(stop) for stop in request.stop if stop in text), default=len(text))
        limit = request.max_new_tokens or 10**9
        kept = text[:end][:limit]
        return Result((Choice(kept, tuple(map(ord, kept)), "length" if len(kept) == limit else "stop"),), len(whole))
