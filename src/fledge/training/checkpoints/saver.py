"""When to write a checkpoint, what is in it, and the way back to one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.training.checkpoints.state import RunState
from fledge.training.checkpoints.store import Checkpoints, Groups

if TYPE_CHECKING:
    from fledge.training.progress import Progress
    from fledge.training.trainer import Trainer

SECONDS_BETWEEN_CHECKPOINTS = 30.0
SECONDS_TO_LEAVE = 60.0  # for what is being written when a run ends with an error
FEWEST_BETWEEN_ANCHORS = 50  # steps


class Stopped(BaseException):
    """Told to stop in the middle of a step, which is left undone."""


class Saver:
    """When to write a checkpoint, and what is in it. A context: when it is left, everything is written."""

    def __init__(
        self, trainer: Trainer, parameters: Mapping[str, Tensor], optimizers: list[torch.optim.Optimizer]
    ) -> None:
        self.trainer = trainer
        self.run = RunState(parameters, optimizers)
        self.groups = Groups(trainer.ranks.rank, trainer.ranks.world)
        self.store = (
            Checkpoints(trainer.checkpoints, self.groups, trainer.keep_last)
            if trainer.checkpoints is not None
            else None
        )
        self.last = time.monotonic()
        self._untold: tuple[int, float] | None = None  # step and seconds of the one being written
        self._at: tuple[int, Mapping[str, Any]] | None = None  # the last whole step, and the counters after it
        self._saved = -1  # the last step of which there is a checkpoint
        self._best: dict[str, Tensor] = {}  # where there is no place to write to
        for optimizer in optimizers if self.store else ():
            optimizer.register_step_pre_hook(lambda *_: self.settle())

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.store is None:
            if kind is Stopped:
                raise SystemExit(143) from None
            return
        if kind is Stopped:
            if self._at is not None and self._at[0] != self._saved:
                self._save(*self._at)
            self.store.writer.wait()
            raise SystemExit(143) from None
        if kind is None:
            self._stand_still(self.store.writer.wait)
            self._tell()
        elif self.store.writer.busy:
            try:
                self.store.writer.wait(SECONDS_TO_LEAVE)
            except Exception as error:  # the run ends with an error of its own
                self.trainer.events.message(str(error), "warning")

    def restore(self) -> tuple[int, Mapping[str, Any]]:
        """Steps already done and the counters, from the newest whole checkpoint."""
        if self.store is None:
            return 0, {}
        self.store.tidy()
        restored = self.store.restore(self.run)
        if restored is None:
            return 0, {}
        for name in restored.damaged:
            self.trainer.events.message(t("checkpoint {name} is damaged and was passed over", name=name), "warning")
        if restored.step:
            self.trainer.events.message(t("going on after step {step}", step=restored.step))
        return restored.step, restored.state

    # --- when --------------------------------------------------------------------------------------------------------

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

    def maybe_save(self, step: int, state: Mapping[str, Any], told_to_stop: bool) -> bool:
        """Save when it is due: at an anchor, or else when the clock says so, which never changes the result.

        Whether to leave, now that everything is written: if any process was told to stop, all of them do, at the same
        step. Raises what went wrong with the writing of earlier ones.
        """
        every, self._at = self.trainer.settings.checkpoint_every, (step, state)
        stop, late = self.groups.largest(told_to_stop, self._late and self.trainer.ranks.first)
        due = step % every == 0 if every else late
        anchor = self.anchor_every and step % self.anchor_every == 0
        if self.store is not None:
            self.store.writer.check()
            if self._untold and not self.store.writer.busy:
                self._tell()
        if stop or ((due or anchor) and step < self.trainer.steps):
            self._save(step, state)
        if stop and self.store is not None:
            self.store.writer.wait()
        return bool(stop)

    @property
    def _late(self) -> bool:
        """Whether the clock wants a checkpoint: not too often for what it costs, and not while one is being written."""
        if self.store is None or self.store.writer.busy:
            return False
        patience = max(SECONDS_BETWEEN_CHECKPOINTS, 20 * self.store.writer.seconds)
        return time.monotonic() - self.last > patience

    def settle(self) -> None:
        """Before parameters or optimiser states change: what is still being written is kept as it is."""
        if self.store is not None:
            self._stand_still(self.store.writer.settle)

    def _save(self, step: int, state: Mapping[str, Any]) -> None:
        if self.store is None:
            return
        store = self.store
        self._stand_still(store.writer.wait)
        self._tell()
        self._untold = step, 0.0
        self._stand_still(lambda: store.save(step, self.run, state, self.anchor_every))
        self.last, self._saved = time.monotonic(), step

    def _stand_still(self, work: Any) -> None:
        """Do it, and count the time for which the training waits."""
        began = time.monotonic()
        work()
        if self._untold:
            self._untold = self._untold[0], self._untold[1] + time.monotonic() - began

    def _tell(self) -> None:
        """The seconds for which the training stood still for the last checkpoint."""
        if self._untold:
            self.trainer.events.metric("checkpoint_seconds", self._untold[1], self._untold[0])
            self._untold = None

    # --- the best weights --------------------------------------------------------------------------------------------

    def keep_best(self, step: int) -> None:
        """Keep the weights after `step` steps: the best so far."""
        if self.store is not None:
            store = self.store
            self._stand_still(lambda: store.save_best(step, self.run))
        else:
            self._best = {name: tensor.clone() for name, tensor in self.run.weights().items()}

    def restore_best(self, step: int) -> None:
        """Put back the weights that were best, after `step` steps."""
        if self.store is None:
            with torch.no_grad():
                for name, tensor in self.run.weights().items():
                    tensor.copy_(self._best[name])
        elif not self.store.restore_best(step, self.run):
            self.trainer.events.message(
                t("the best weights, after step {step}, are damaged: the last ones are taken", step=step), "warning"
            )

    # --- the way back ------------------------------------------------------------------------------------------------

    def return_from(self, step: int, progress: Progress) -> int:
        """Go back from a run gone astray after `step` steps; where to. Raises FledgeError when it may not any more."""
        stability, events = progress.stability, self.trainer.events
        if self.store is not None and stability.rollbacks < stability.rollbacks_allowed:
            latest = step - stability.bad
            if stability.returned_to >= 0 and latest - stability.returned_to < self.anchor_every:
                latest = stability.returned_to - 1  # no new anchor since: that one is no good, or this is the data
            restored = self.store.restore(self.run, max(0, latest), self.anchor_every)
            if restored is not None and restored.state:
                stability.returned(step, restored.step, restored.state)
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
