"""What `/metrics` tells Prometheus: requests, tokens, time to first token, latency, what is going on now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fledge.core.errors import FledgeError

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server; a registry of its own, so that two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        model = ["model"]
        self.requests = Counter(
            "fledge_requests", "Requests, by how they ended", [*model, "outcome"], registry=registry
        )
        self.tokens = Counter("fledge_tokens", "Tokens read and written", [*model, "kind"], registry=registry)
        self.active = Gauge("fledge_active_requests", "Requests being answered", model, registry=registry)
        times: dict[str, Any] = {"labelnames": model, "buckets": _SECONDS, "registry": registry}
        self.first = Histogram("fledge_time_to_first_token_seconds", "Until the first token", **times)
        self.latency = Histogram("fledge_request_seconds", "Until the last token", **times)

    @contextmanager
    def request(self, model: str) -> Iterator[Timing]:
        """Count one request. It ended "ok" when it was finished, "error" when it raised, else "cancelled"."""
        timing = Timing(self, model)
        outcome = "cancelled"
        with self.active.labels(model).track_inprogress():
            try:
                yield timing
                outcome = "ok" if timing.finished else "cancelled"
            except FledgeError:
                outcome = "error"
                raise
            finally:
                self.requests.labels(model, outcome).inc()
                if outcome == "ok":
                    self.latency.labels(model).observe(time.perf_counter() - timing.begun)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry)


class Timing:
    """One request's progress."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.metrics, self.model = metrics, model
        self.begun = time.perf_counter()
        self.finished = False
        self._waiting = True

    def read(self, tokens: int) -> None:
        """The prompt is known."""
        self.metrics.tokens.labels(self.model, "prompt").inc(tokens)

    def wrote(self, tokens: int, finished: bool) -> None:
        """Some tokens came; were they the last?"""
        self.finished = finished
        if self._waiting and tokens:
            self._waiting = False
            self.metrics.first.labels(self.model).observe(time.perf_counter() - self.begun)
        self.metrics.tokens.labels(self.model, "completion").inc(tokens)
