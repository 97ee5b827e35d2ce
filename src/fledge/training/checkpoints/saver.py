"""When to write a checkpoint, what is in it, and the way back to one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.training.checkpoints.folders import Checkpoints

if TYPE_CHECKING:
    from fledge.training.progress import Progress
    from fledge.training.trainer import Trainer

SECONDS_BETWEEN_CHECKPOINTS = 30.0
FEWEST_BETWEEN_ANCHORS = 50  # steps


class Saver:
    """When to write a checkpoint, and what is in it."""

    def __init__(
        self, trainer: Trainer, parameters: Mapping[str, Tensor], optimizers: list[torch.optim.Optimizer]
    ) -> None:
        self.trainer, self.parameters, self.optimizers = trainer, parameters, optimizers
        self.store = Checkpoints(trainer.checkpoints) if trainer.checkpoints else None
        self.last, self.cost = time.monotonic(), 0.0

    def restore(self) -> tuple[int, Mapping[str, Any]]:
        """Steps already done and the counters, from the newest whole checkpoint."""
        restored = self.store.restore(self.parameters, self.optimizers) if self.store else None
        if restored is None:
            return 0, {}
        for name in restored.damaged:
            self.trainer.events.message(t("checkpoint {name} is damaged and was passed over", name=name), "warning")
        if restored.step:
            self.trainer.events.message(t("going on after step {step}", step=restored.step))
        return restored.step, restored.state

    @property
    def anchor_every(self) -> int:
        """Steps between the checkpoints to which a run may return; which they are, no clock decides."""
        if not self.trainer.settings.rollbacks:
            return 0
        return self.trainer.settings.checkpoint_every or max(FEWEST_BETWEEN_ANCHORS, self.trainer.steps // 10)

    def save_first(self, step: int, state: Mapping[str, Any]) -> None:
        """The beginning is a place to return to."""
        if self.anchor_every and step == 0:
            self._save(0, state)

    def maybe_save(self, step: int, state: Mapping[str, Any], told_to_stop: bool) -> None:
        """Save when it is due: at an anchor, or else when the clock says so, which never changes the result."""
        every, now = self.trainer.settings.checkpoint_every, time.monotonic()
        patience = max(SECONDS_BETWEEN_CHECKPOINTS, 20 * self.cost)
        due = step % every == 0 if every else now - self.last > patience
        anchor = self.anchor_every and step % self.anchor_every == 0
        if told_to_stop or ((due or anchor) and step < self.trainer.steps):
            self._save(step, state)

    def _save(self, step: int, state: Mapping[str, Any]) -> None:
        if self.store is not None and self.trainer.ranks.first:
            began = time.monotonic()
            self.store.save(step, self.parameters, self.optimizers, state, self.anchor_every)
            self.last = time.monotonic()
            self.cost = self.last - began

    def return_from(self, step: int, progress: Progress) -> int:
        """Go back from a run gone astray after `step` steps; where to. Raises FledgeError when it may not any more."""
        stability, events = progress.stability, self.trainer.events
        self.trainer.ranks.wait()
        if self.store is not None and stability.rollbacks < stability.rollbacks_allowed:
            latest = step - stability.bad
            if stability.returned_to >= 0 and latest - stability.returned_to < self.anchor_every:
                latest = stability.returned_to - 1  # no new anchor since: that one is no good, or this is the data
            restored = self.store.restore(self.parameters, self.optimizers, max(0, latest), self.anchor_every)
            if restored is not None and restored.state:
                self.trainer.ranks.wait()
                stability.returned(step, restored.step, restored.state)
                if self.trainer.ranks.first:
                    self.store.forget_after(restored.step)
                self._save(restored.step, progress.state())
                events.message(
                    t(
                        "the run has gone astray at step {step}: back to step {target}, with other batches",
                        step=step,
                        target=restored.step,
                    ),
                    "warning",
                )
                return restored.step
        raise FledgeError(
            Problem(
                t("the training has diverged: {count} steps in a row had to be left out", count=stability.bad),
                fix=t("lower the learning rate, lengthen the warm-up, or set dtype to float32"),
            )
        )
