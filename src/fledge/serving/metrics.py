"""What `/metrics` tells Prometheus: requests, tokens, time to first token, latency, what is going on now."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fledge.core.errors import FledgeError

_GAUGES = {
    "waiting": "Answers that wait for a place",
    "reading": "Answers whose prompts are being read",
    "running": "Answers being written",
    "blocks_total": "Blocks of keys and values there may be",
    "blocks_used": "Blocks that answers refer to",
    "blocks_cached": "Blocks kept for prompts that begin like earlier ones",
    "fragmentation": "Share of the used blocks' slots that hold no token",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts to read, those put back included",
    "prefix_hit_tokens": "Those that did not have to be computed",
    "preemptions": "How often an answer was put back for want of blocks",
    "draft_tokens": "Tokens guessed ahead",
    "accepted_tokens": "Guessed tokens that stayed",
}
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server; a registry of its own, so that two servers in one process do not mix."""

    def __init__(self, engines: Mapping[str, Any]) -> None:
        """`engines`, by model: those that keep `statistics` are asked for them at every scrape."""
        self.registry = registry = CollectorRegistry()
        registry.register(EngineCollector(engines))
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


class EngineCollector:
    """What the engines themselves know: their queues, their blocks, their prefix cache."""

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self.engines = engines

    def collect(self) -> Iterator[Metric]:
        """As Prometheus' library wants them."""
        known = {name: engine.statistics() for name, engine in self.engines.items() if hasattr(engine, "statistics")}
        for kind, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for field, text in kind.items():
                metric = family(f"fledge_engine_{field}", text, labels=["model"])
                for name, statistics in known.items():
                    metric.add_metric([name], getattr(statistics, field))
                yield metric


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
