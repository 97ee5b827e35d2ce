"""`best_of`: more answers are sampled than are returned, and the likeliest go out."""

from __future__ import annotations

from dataclasses import replace

from fledge.core.errors import FledgeError
from fledge.inference.engine import Delta, Listen, Request


class Ranking:
    """Listens to `best_of` answers until all have ended; then tells the `n` likeliest of them, best first.

    Likely is the mean log-probability per token under the model itself; of equals the one sampled first goes first.
    """

    def __init__(self, request: Request, listen: Listen) -> None:
        self._request, self._listen = request, listen
        self._deltas: list[list[Delta]] = [[] for _ in range(request.best_of or request.n)]
        self._open = len(self._deltas)

    def __call__(self, delta: Delta | FledgeError) -> None:
        if isinstance(delta, FledgeError):
            self._listen(delta)
            return
        self._deltas[delta.index].append(delta)
        self._open -= delta.finish_reason is not None
        if not self._open:
            best = sorted(self._deltas, key=_mean, reverse=True)[: self._request.n]
            for index, deltas in enumerate(best):
                for one in deltas:
                    asked = one.logprobs if self._request.logprobs is not None else ()
                    self._listen(replace(one, index=index, logprobs=asked))


def _mean(deltas: list[Delta]) -> float:
    """The mean log-probability of an answer's tokens; one that was cancelled is not ranked above any other."""
    found = [token.logprob for delta in deltas for token in delta.logprobs]
    cancelled = deltas[-1].finish_reason == "cancelled"
    return float("-inf") if cancelled or not found else sum(found) / len(found)
