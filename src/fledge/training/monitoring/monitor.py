"""Speed, memory and waiting of a run: two readings of the clock and a few additions a step, no tensor operation.

with monitor.waiting():
    batch = source.batch(step)
…
monitor.step(tokens, length)
monitor.metrics()          # every `log_every` steps
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fledge.core.events import Emitter
from fledge.training.monitoring.flops import flops_per_token
from fledge.training.monitoring.matrix_rate import MatrixRate, matrix_rate


class Monitor:
    """One process's view of a run. The first step of an attempt, in which things are compiled, does not count.

    `model` is what multiplies (None where nobody asks for MFU); `world` processes share the tokens.
    """

    def __init__(
        self, model: Any, device: str, dtype: str, world: int = 1, events: Emitter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.model, self.device, self.dtype, self.world, self.events = model, device, dtype, world, events
        self.clock = clock
        self.steps = self.tokens = 0
        self.waited = 0.0
        self.began = 0.0
        self.length = 0
        self.wait_share = 0.0
        """of the last interval"""
        self.wait_seconds = 0.0
        """a step, in the last interval"""
        self.mfu = 0.0
        self.rate = 0.0
        """tokens a second in the last interval"""
        self._peak: MatrixRate | None = None
        self._flops: dict[int, float] = {}
        self._resident_peak = self._told = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the asking for a batch."""
        start = self.clock()
        yield
        if self.steps:
            self.waited += self.clock() - start

    def step(self, tokens: int, length: int) -> None:
        """A step was made with `tokens` of all processes together, in rows of `length`."""
        self.steps += 1
        self.length = max(self.length, length)
        if self.steps == 1:
            self.began = self.clock()
        else:
            self.tokens += tokens

    def metrics(self) -> dict[str, float]:
        """What was measured since the last time: `mfu` and `data_wait` as shares, memory in bytes."""
        now = self.clock()
        seconds = now - self.began
        if self.steps and self.tokens and seconds > 0:
            self.rate, self.wait_share = self.tokens / seconds, min(1.0, self.waited / seconds)
            self.wait_seconds = self.waited / max(1, self.steps - self._told)
            self._told = self.steps
            self.mfu = self._utilisation(self.rate)
            self.began, self.tokens, self.waited = now, 0, 0.0
        found = {"data_wait": self.wait_share, **self.memory()}
        return {"mfu": self.mfu, **found} if self.mfu else found

    def _utilisation(self, rate: float) -> float:
        if self.model is None:
            return 0.0
        if self.length not in self._flops:
            self._flops[self.length] = flops_per_token(self.model, self.length)
        if not self._flops[self.length]:
            return 0.0
        if self._peak is None:
            before = self.clock()
            self._peak = matrix_rate(self.device, self.dtype, self.events)
            self.began += self.clock() - before  # measuring is no part of the run
        return rate * self._flops[self.length] / (self.world * self._peak.value)

    def memory(self) -> dict[str, float]:
        """Bytes in use now and at most: of the card where there is one, else of this process."""
        if torch.device(self.device).type == "cuda":
            allocated, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
            return {"memory": float(allocated), "memory_peak": float(most)}
        now = resident()
        self._resident_peak = max(self._resident_peak, now, _resident_peak())
        return {"memory": float(now), "memory_peak": float(self._resident_peak)}

    def summary(self) -> dict[str, Any]:
        """For the metrics of the whole run."""
        if not self.mfu or self._peak is None:
            return {}
        return {
            "mfu": round(self.mfu, 4),
            "matrix_rate": round(self._peak.value),
            "matrix_rate_source": self._peak.source,
        }


def resident() -> int:
    """Bytes of memory that this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _resident_peak() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else 1024 * most)
