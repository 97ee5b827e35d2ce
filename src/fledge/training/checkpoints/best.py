"""Measuring held-out rows while a run goes on, keeping the best weights, and stopping when nothing gets better.

When it is measured follows from the steps alone, and so does where the run stops: killed and resumed, it stops there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fledge.training.settings import TrainSettings

if TYPE_CHECKING:
    from fledge.training.checkpoints.saver import Saver


class Best:
    """The lowest loss on held-out rows so far; its weights are kept where there is patience to lose."""

    def __init__(self, settings: TrainSettings, state: Mapping[str, Any]) -> None:
        self.every, self.patience = settings.evaluate_every, settings.patience
        self.min_delta = settings.min_delta
        self.value, self.step = state.get("best", float("inf")), int(state.get("best_step", 0))
        self.waited = int(state.get("waited", 0))
        """measurements since the best one"""

    def due(self, step: int) -> bool:
        """Whether to measure after `step` steps."""
        return bool(self.every) and step % self.every == 0

    def measured(self, step: int, value: float, saver: Saver) -> None:
        """Take note of the loss after `step` steps, and have the weights of the best kept.

        Better is lower by more than `min_delta`: an equal loss is not, and NaN never is.
        """
        if not value < self.value - self.min_delta:
            self.waited += 1
            return
        self.value, self.step, self.waited = value, step, 0
        if self.patience:
            saver.keep_best(step)

    @property
    def exhausted(self) -> bool:
        """Whether the run should stop."""
        return bool(self.patience) and self.waited >= self.patience

    def restore(self, step: int, saver: Saver) -> None:
        """Put the best weights back, unless those of `step`, which are there, are the best."""
        if self.patience and self.step and self.step != step:
            saver.restore_best(self.step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        best = {"best": self.value, "best_step": self.step} if self.step else {}
        return best | ({"waited": self.waited} if self.step or self.waited else {})

    def summary(self) -> dict[str, Any]:
        """The metrics of the run, where anything was measured."""
        return {"best_held_out_loss": self.value, "best_step": self.step} if self.step else {}
