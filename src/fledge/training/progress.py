"""What is told while a run goes on, and what is left of it in the end."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fledge.core.language import t
from fledge.training.checkpoints.best import Best
from fledge.training.estimation.forecast import Forecast
from fledge.training.monitoring.monitor import Monitor
from fledge.training.monitoring.sources import named
from fledge.training.monitoring.statistics import Statistics
from fledge.training.objective import Batch
from fledge.training.optimization.loss_scale import LossScale
from fledge.training.stability.diagnosis import Diagnosis
from fledge.training.stability.judge import NOT_FINITE, Stability

if TYPE_CHECKING:
    from fledge.training.trainer import Trainer

RECENT = 50  # steps over which the final loss is averaged
_HALF = 65504.0 / 2  # of fp16's largest number


class Progress:
    """What is told while a run goes on, and what is left of it in the end."""

    def __init__(self, trainer: Trainer, restored: tuple[int, Mapping[str, Any]]) -> None:
        self.trainer, settings = trainer, trainer.settings
        self.step, state = restored
        self.tokens = int(state.get("tokens", 0))
        self.recent: deque[float] = deque(state.get("recent", ()), maxlen=RECENT)
        self.stability = Stability(settings, state)
        self.best = Best(settings, state)
        self.told: set[str] = set()
        self.diagnosis = Diagnosis(settings, trainer.steps, self.tell)
        self.scale = LossScale(settings.dtype, state.get("loss_scale"), int(state.get("whole_steps", 0)))
        self.started, self.timed = 0.0, 0  # from the end of the first step, in which things are compiled
        self.pending: dict[str, tuple[float, float]] = {}  # Σ value · weight, Σ weight since the last point
        self.sources: tuple[str, ...] = tuple(getattr(trainer.source, "sources", ()))
        ranks, first = trainer.ranks, trainer.objective.trainable[0]
        model = trainer.models[first] if ranks.first and len(trainer.objective.trainable) == 1 else None
        self.forecast = Forecast(trainer)
        self.monitor = Monitor(model, trainer.device, settings.dtype, ranks.world, trainer.events)
        self.statistics = Statistics(
            trainer.spread.held,
            settings.statistics_every, self.diagnosis.looks, _HALF if settings.dtype == "float16" else 0.0,
        )  # fmt: skip

    def record(
        self, step: int, measured: Mapping[str, float], norm: float, rate: float, batch: Batch, trouble: str
    ) -> None:
        """One step was made, or left out because of some trouble."""
        self._count(batch)
        # a loss that is not finite has overflowed on the way forward, which no smaller scale would mend
        scaled = self.scale.update(finite=trouble != NOT_FINITE) if math.isfinite(measured["loss"]) else False
        if not trouble:
            self.stability.made(measured["loss"], norm)
            self.recent.append(measured["loss"])
            self.diagnosis.step(step, measured["loss"], norm, rate, labelled=bool(norm or measured["loss"]))
            self._gather({**measured, "grad_norm": norm}, getattr(measured, "weights", {}))
        elif scaled:
            self.diagnosis.scaled(self.scale.value)
        else:
            self._leave_out(step, trouble)
        self._show_layers(step + 1)
        self._show(step + 1, rate)
        self.forecast.step(step + 1, batch)

    def _count(self, batch: Batch) -> None:
        tokens = self.trainer.objective.tokens(batch)
        self.tokens += tokens
        if self.started:
            self.timed += tokens
        else:
            self.started = time.monotonic()
        lengths = [value.shape[-1] for name, value in batch.items() if name.endswith("input_ids")]
        self.monitor.step(tokens, max(lengths, default=0))

    def _gather(self, values: Mapping[str, float], weights: Mapping[str, float]) -> None:
        """Add to the next point of the curves; a source counts by its tokens, so that its mean is theirs."""
        for term, value in values.items():
            weight = weights.get(term, 1.0)
            if weight:
                total, count = self.pending.get(name := named(term, self.sources), (0.0, 0.0))
                self.pending[name] = total + value * weight, count + weight

    def _show_layers(self, done: int) -> None:
        """The statistics of this step, where it was asked for them."""
        if not self.statistics.found:
            return
        self.diagnosis.layers(self.statistics.found)
        if self.trainer.settings.statistics_every and done % self.trainer.settings.statistics_every == 0:
            for name, value in self.statistics.found.items():
                self.trainer.events.metric(name, value, done)
        self.statistics.found = {}

    def _show(self, done: int, rate: float) -> None:
        """A point of every curve every `log_every` steps, and how far the run is."""
        events = self.trainer.events
        if done % self.trainer.settings.log_every == 0 or done == self.trainer.steps:
            found = {name: total / count for name, (total, count) in self.pending.items()}
            found |= {"lr": rate, "tokens_per_second": self.rate, **self.monitor.metrics()}
            if self.scale.dynamic:
                found["loss_scale"] = self.scale.value
            for name, value in found.items():
                events.metric(name, value, done)
            self.diagnosis.waited(self.monitor.wait_share, self.monitor.wait_seconds, done)
            self.pending = {}
        loss = self.recent[-1] if self.recent else None
        speed = {"tokens_per_second": self.rate} | ({"mfu": self.monitor.mfu} if self.monitor.mfu else {})
        events.progress(done, self.trainer.steps, "steps", loss=loss, **speed)

    def _leave_out(self, step: int, trouble: str) -> None:
        self.stability.left_out()
        if trouble == NOT_FINITE:
            message = t("step {step} had no finite gradient and was skipped", step=step + 1)
        else:
            message = t("step {step} jumped out of the recent ones and was left out", step=step + 1)
        self.trainer.events.message(message, "warning")

    def held_out(self, step: int, value: float) -> None:
        """The loss on held-out rows after `step` steps was `value`; said aloud where it rises while training falls."""
        self.trainer.events.metric("held_out_loss", value, step)
        trained = self.recent[-1] if self.recent else value
        improved = self.best.step > self.trainer.settings.evaluate_every
        self.diagnosis.held_out(value, self.best.value, trained, self.best.waited, improved)

    def tell(self, name: str, message: str) -> None:
        """Warn, once."""
        if message and name not in self.told:
            self.told.add(name)
            self.trainer.events.message(message, "warning")

    @property
    def rate(self) -> float:
        """Tokens a second since the first step of this attempt."""
        return self.timed / max(1e-9, time.monotonic() - self.started) if self.timed else 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this."""
        counters = {"tokens": self.tokens, "recent": list(self.recent)}
        return counters | self.stability.state() | self.scale.state() | self.best.state()

    def summary(self, steps: int) -> dict[str, Any]:
        """The metrics of the whole run, which ended after `steps`."""
        final = sum(self.recent) / len(self.recent) if self.recent else float("nan")
        return {
            "final_loss": final,
            "steps": steps,
            "tokens": self.tokens,
            "tokens_per_second": round(self.rate, 1),
            "skipped_steps": self.stability.skipped,
            "rollbacks": self.stability.rollbacks,
            **self.monitor.summary(),
            **self.forecast.summary(),
            **self.best.summary(),
        }
