"""What is told while a run goes on, and what is left of it in the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fledge.core.language import t
from fledge.training.checkpoints.best import Best
from fledge.training.optimization.loss_scale import LossScale
from fledge.training.stability.diagnosis import STEPS as DIAGNOSED
from fledge.training.stability.diagnosis import symptoms
from fledge.training.stability.judge import Stability

if TYPE_CHECKING:
    from fledge.training.trainer import Trainer

RECENT = 50  # steps over which the final loss is averaged


class Progress:
    """What is told while a run goes on, and what is left of it in the end."""

    def __init__(self, trainer: Trainer, restored: tuple[int, Mapping[str, Any]]) -> None:
        self.trainer = trainer
        self.step, state = restored
        self.tokens = int(state.get("tokens", 0))
        self.recent: deque[float] = deque(state.get("recent", ()), maxlen=RECENT)
        self.stability = Stability(trainer.settings, state)
        self.best = Best(trainer.settings, trainer.checkpoints, state)
        self.told: set[str] = set()
        self.curve: deque[tuple[float, float]] = deque(maxlen=DIAGNOSED)
        self.scale = LossScale(trainer.settings.dtype, state.get("loss_scale"), int(state.get("whole_steps", 0)))
        self.started, self.timed = 0.0, 0  # from the end of the first step, in which things are compiled
        self.pending: dict[str, list[float]] = {}

    def record(
        self, step: int, measured: dict[str, float], norm: float, rate: float, tokens: int, trouble: str
    ) -> None:
        """One step was made, or left out because of some trouble."""
        self.tokens += tokens
        if self.started:
            self.timed += tokens
        else:
            self.started = time.monotonic()
        excused = self.scale.update(finite=trouble != "not finite")
        if not trouble:
            self.stability.made(measured["loss"], norm)
            self.recent.append(measured["loss"])
            self._diagnose(step, measured["loss"], norm, rate)
            for name, value in {**measured, "grad_norm": norm}.items():
                self.pending.setdefault(name, []).append(value)
        elif not excused:
            self._leave_out(step, trouble)
        done = step + 1
        if done % self.trainer.settings.log_every == 0 or done == self.trainer.steps:
            for name, values in self.pending.items():
                self.trainer.events.metric(name, sum(values) / len(values), done)
            self.trainer.events.metric("lr", rate, done)
            self.trainer.events.metric("tokens_per_second", self.rate, done)
            self.pending = {}
        loss = self.recent[-1] if self.recent else None
        self.trainer.events.progress(done, self.trainer.steps, "steps", loss=loss, tokens_per_second=self.rate)

    def _leave_out(self, step: int, trouble: str) -> None:
        self.stability.left_out()
        if trouble == "spike":
            message = t("step {step} jumped out of the recent ones and was left out", step=step + 1)
        else:
            message = t("step {step} had no finite gradient and was skipped", step=step + 1)
        self.trainer.events.message(message, "warning")

    def _diagnose(self, step: int, loss: float, norm: float, rate: float) -> None:
        """Say what ails a young run, each thing once: later, a loss that stands still may be a success."""
        self.curve.append((loss, norm))
        if step % 50 or step > max(DIAGNOSED, 0.4 * self.trainer.steps):
            return
        losses, norms = zip(*self.curve, strict=True)
        for name, message in symptoms(losses, norms, rate, self.trainer.settings.grad_clip):
            self.tell(name, message)

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
            **self.best.summary(),
        }
