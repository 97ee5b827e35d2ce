"""The Trainer: one loop for every objective. It reads from top to bottom in `fit`.

Resuming is exact: a batch is a pure function of its step, and so is the randomness of the step (dropout), so a
checkpoint needs nothing but weights, optimiser state and a few counters.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fledge.core.artifact import digest_of
from fledge.core.errors import FledgeError, Problem
from fledge.core.events import Emitter
from fledge.core.language import t
from fledge.training.best import Best
from fledge.training.checkpoint import Checkpoints
from fledge.training.diagnosis import STEPS as DIAGNOSED
from fledge.training.diagnosis import out_of_memory, symptoms, worse_on_held_out
from fledge.training.loss_scale import LossScale
from fledge.training.objective import Batch, BatchSource, Objective, Term, as_batch, rows_of, take
from fledge.training.optimizer import build_optimizers, clip, set_lr
from fledge.training.ranks import Ranks
from fledge.training.schedule import lr_factor
from fledge.training.settings import TrainSettings
from fledge.training.stability import Stability

SECONDS_BETWEEN_CHECKPOINTS = 30.0
FEWEST_BETWEEN_ANCHORS = 50  # steps
RECENT = 50  # steps over which the final loss is averaged


@dataclass
class Trainer:
    """Minimise `objective` on `source` for `steps` steps."""

    objective: Objective
    models: Mapping[str, nn.Module]
    source: BatchSource
    settings: TrainSettings
    steps: int
    seed: int
    events: Emitter
    checkpoints: Path | None = None
    micro_batch: int = 0
    ranks: Ranks = field(default_factory=Ranks)
    device: str = "cpu"
    activation_checkpointing: bool = False
    held_out_loss: Callable[[], float] | None = None
    """measured every `evaluate_every` steps"""

    def fit(self) -> dict[str, Any]:
        """Train; the models are changed in place. Gives the final loss, tokens seen and tokens a second.

        Goes on from the newest whole checkpoint. Raises FledgeError when the run goes astray more often than it may
        return, and when a step does not fit into memory.
        """
        trained: list[Any] = [self.models[name] for name in self.objective.trainable]
        parameters = {
            f"{name}.{key}": parameter
            for name in self.objective.trainable
            for key, parameter in self.models[name].named_parameters()
            if parameter.requires_grad
        }
        optimizers = build_optimizers(trained, self.settings)
        saver = _Saver(self, parameters, optimizers)
        progress = _Progress(self, saver.restore())
        scale, stability, best = progress.scale, progress.stability, progress.best
        saver.save_first(progress.step, progress.state())
        self._prepare(trained)

        with _until_told_to_stop() as stop:
            step = progress.step
            while step < self.steps and not best.exhausted:
                rate = set_lr(optimizers, lr_factor(step, self.steps, self.settings))
                batch = as_batch(self.source.batch(step + stability.shift), self.device)
                measured = self._accumulate(batch, step, scale.value)
                self.ranks.sum(p.grad for p in parameters.values() if p.grad is not None)
                scale.unscale(p.grad for p in parameters.values() if p.grad is not None)
                norm = clip(parameters.values(), self.settings.grad_clip)
                trouble = stability.judge(measured["loss"], norm)
                if not trouble:
                    for optimizer in optimizers:
                        optimizer.step()
                for parameter in parameters.values():
                    parameter.grad = None
                progress.record(step, measured, norm, rate, self.objective.tokens(batch), trouble)
                step = saver.return_from(step + 1, progress) if stability.astray else step + 1
                if best.due(step) and not trouble:
                    best.measured(step, self._on_held_out(step, progress), parameters, self.ranks.first)
                saver.maybe_save(step, progress.state(), told_to_stop=stop.is_set())
                if stop.is_set():
                    raise SystemExit(143)
        self.ranks.wait()
        best.restore(step, parameters)
        for model in trained if self.activation_checkpointing else ():
            model.gradient_checkpointing_disable()
        for model in self.models.values():
            model.eval()
        return progress.summary(step)

    def _prepare(self, trained: list[Any]) -> None:
        """Models that are trained in training mode, if the objective has them drop out; the others as they answer."""
        for name, model in self.models.items():
            model.train(self.objective.dropout and name in self.objective.trainable)
        for model in trained if self.activation_checkpointing else ():
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def _on_held_out(self, step: int, progress: _Progress) -> float:
        """The loss on held-out rows after `step` steps; said aloud where it has risen twice while training fell."""
        if self.held_out_loss is None:
            raise FledgeError(
                Problem(
                    t("there are no held-out rows to measure"),
                    where="train.evaluate_every",
                    fix=t("name them with held_out, or leave evaluate_every out"),
                )
            )
        before = {name: model.training for name, model in self.models.items()}
        for model in self.models.values():
            model.eval()
        value = self.held_out_loss()
        for name, model in self.models.items():
            model.train(before[name])
        self.events.metric("held_out_loss", value, step)
        trained = progress.recent[-1] if progress.recent else value
        if progress.best.waited and trained < progress.best.value:
            progress.tell("over-fits", worse_on_held_out(progress.best.value, value, trained))
        return value

    def _accumulate(self, batch: Batch, step: int, scale: float = 1.0) -> dict[str, float]:
        """Gradients of the whole batch times `scale`, a micro-batch at a time; the terms' values over all rows and
        ranks."""
        totals = self.objective.weights(batch)
        mine = take(batch, self.ranks.share(rows_of(batch)))
        size = self.micro_batch if self.micro_batch and self.objective.rows_independent else max(1, rows_of(mine))
        sums: dict[str, list[float]] = {}
        coefficients: dict[str, float] = {}
        self._reseed(step)
        for start in range(0, rows_of(mine), size):
            micro = take(mine, slice(start, start + size))
            try:
                terms = self._gradients(micro, totals, scale)
            except (RuntimeError, MemoryError) as error:
                raise (out_of_memory(error, rows_of(micro)) or error) from None
            for name, term in terms.items():
                entry = sums.setdefault(name, [0.0, 0.0])
                entry[0] += float(term.sum.detach())
                entry[1] += float(term.weight)
                coefficients[name] = term.coefficient
        return self._means(sums, coefficients)

    def _gradients(self, micro: Batch, totals: Mapping[str, float], scale: float) -> dict[str, Term]:
        """Add the gradients of some rows to those that are there."""
        with self._autocast():
            terms = self.objective.loss(self.objective.forward(self.models, micro), micro)
        parts = [
            term.sum * (scale * term.coefficient / totals[name])
            for name, term in terms.items()
            if term.coefficient and totals[name]
        ]
        if parts:
            torch.stack(parts).sum().backward()
        return terms

    def _means(self, sums: dict[str, list[float]], coefficients: dict[str, float]) -> dict[str, float]:
        """Every term's mean over all ranks, and `loss`, their weighted sum."""
        table = torch.tensor([sums[name] for name in sums], dtype=torch.float64)
        self.ranks.sum([table])
        means = {name: float(s / w) if w else 0.0 for name, (s, w) in zip(sums, table.tolist(), strict=True)}
        loss = sum(coefficients[name] * value for name, value in means.items() if coefficients[name])
        return {**means, "loss": loss}

    def _reseed(self, step: int) -> None:
        """What is random in a step depends on the seed, the step and the rank alone."""
        torch.manual_seed(int(digest_of([self.seed, step, self.ranks.rank])[:15], 16))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=getattr(torch, self.settings.dtype))


class _Saver:
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

    def return_from(self, step: int, progress: _Progress) -> int:
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


class _Progress:
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


@contextmanager
def _until_told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: the step in hand is finished and a checkpoint written before the process leaves."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
