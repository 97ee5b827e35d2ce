"""Stopping trials that will not win, by a metric they emit on the way.

A trial is looked at on rungs: when certain shares of its training are done. What it has reached there is the mean of
the watched metric since half that share, so that it depends on no clock and little on noise.

median: it is stopped where it is worse than the median of the earlier trials on the same rung (Golovin et al., 2017).
asha: it is stopped unless it is among the best third there (successive halving: Li et al., 2020, η = 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Literal, TypeAlias

from fledge.core.events import Event
from fledge.training.search.trial import Trial

Rule: TypeAlias = Literal["median", "asha"]
RUNGS: dict[Rule, tuple[float, ...]] = {"median": (0.25, 0.375, 0.5, 0.625, 0.75), "asha": (1 / 9, 1 / 3)}
ETA = 3
FIRST = 4
"""Trials that are never stopped by the median: without them there is nothing to compare with."""


class Hopeless(KeyboardInterrupt):
    """Raised while a stage runs, whose process is then stopped as if by Ctrl-C."""


class Watch:
    """Listens to one trial. `rungs` holds what it has reached; `hopeless` whether it was stopped."""

    def __init__(self, stage: str, metric: str, maximize: bool, rule: Rule | None, earlier: Sequence[Trial]) -> None:
        self.stage, self.metric, self.sign = stage, metric, -1 if maximize else 1
        self.rule, self.earlier = rule, earlier
        self.rungs: dict[float, float] = {}
        self.hopeless = False
        self._total = 0.0
        self._points: dict[float, float] = {}

    def hear(self, event: Event) -> None:
        """Take in an event. Raises Hopeless, once."""
        if event.stage != self.stage or self.hopeless:
            return
        if event.kind == "progress" and event.data.get("total") and event.name == "steps":
            self._total = float(event.data["total"])
        if event.kind == "metric" and event.name == self.metric and event.step is not None:
            self._points[float(event.step)] = float(event.value)
        self._climb()

    def _climb(self) -> None:
        if not self._total or not self._points:
            return
        done = max(self._points) / self._total
        for rung in RUNGS[self.rule] if self.rule else ():
            if rung in self.rungs or done < rung:
                continue
            since = [v for step, v in self._points.items() if rung / 2 < step / self._total <= rung]
            nearest = max((step for step in self._points if step / self._total <= rung), default=min(self._points))
            self.rungs[rung] = fmean(since) if since else self._points[nearest]
            if self._is_hopeless(rung):
                self.hopeless = True
                raise Hopeless

    def _is_hopeless(self, rung: float) -> bool:
        others = [self.sign * trial.rungs[rung] for trial in self.earlier if rung in trial.rungs]
        mine = self.sign * self.rungs[rung]
        if mine != mine:  # not a number
            return True
        if self.rule == "asha":
            return len(others) + 1 >= ETA and sum(other < mine for other in others) >= -(-(len(others) + 1) // ETA)
        return len(others) >= FIRST and mine > median(others)
