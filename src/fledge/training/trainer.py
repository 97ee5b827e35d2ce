"""The Trainer: one loop for every objective. It reads from top to bottom in `fit`.

Resuming is exact: a batch is a pure function of its step, and so is the randomness of the step (dropout), so a
checkpoint needs nothing but weights, optimiser state and a few counters.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
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
from fledge.training.checkpoint import Checkpoints
from fledge.training.loss_scale import LossScale
from fledge.training.objective import Batch, BatchSource, Objective, as_batch, rows_of, take
from fledge.training.optimizer import build_optimizers, clip, set_lr
from fledge.training.ranks import Ranks
from fledge.training.schedule import lr_factor
from fledge.training.settings import TrainSettings

BAD_STEPS = 5  # steps in a row without a finite gradient, after which the run has failed
SECONDS_BETWEEN_CHECKPOINTS = 30.0
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

    def fit(self) -> dict[str, Any]:
        """Train; the models are changed in place. Gives the final loss, tokens seen and tokens a second.

        Goes on from the newest whole checkpoint. Raises FledgeError when the loss stays without a finite value.
        """
        trained = [self.models[name] for name in self.objective.trainable]
        parameters = {
            f"{name}.{key}": parameter
            for name in self.objective.trainable
            for key, parameter in self.models[name].named_parameters()
            if parameter.requires_grad
        }
        optimizers = build_optimizers(trained, self.settings)
        saver = _Saver(self, parameters, optimizers)
        progress = _Progress(self, saver.restore())
        scale = progress.scale
        for name, model in self.models.items():
            model.train(self.objective.dropout and name in self.objective.trainable)

        with _until_told_to_stop() as stop:
            for step in range(progress.step, self.steps):
                rate = set_lr(optimizers, lr_factor(step, self.steps, self.settings))
                batch = as_batch(self.source.batch(step), self.device)
                measured = self._accumulate(batch, step, scale.value)
                self.ranks.sum(p.grad for p in parameters.values() if p.grad is not None)
                scale.unscale(p.grad for p in parameters.values() if p.grad is not None)
                norm = clip(parameters.values(), self.settings.grad_clip)
                finite = math.isfinite(norm) and math.isfinite(measured["loss"])
                if finite:
                    for optimizer in optimizers:
                        optimizer.step()
                for parameter in parameters.values():
                    parameter.grad = None
                progress.record(step, measured, norm, rate, self.objective.tokens(batch), finite)
                saver.maybe_save(step + 1, progress.state(), told_to_stop=stop.is_set())
                if stop.is_set():
                    raise SystemExit(143)
        for model in self.models.values():
            model.eval()
        return progress.summary()

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
            with self._autocast():
                terms = self.objective.loss(self.objective.forward(self.models, micro), micro)
            parts = [
                term.sum * (scale * term.coefficient / totals[name])
                for name, term in terms.items()
                if term.coefficient and totals[name]
            ]
            if parts:
                torch.stack(parts).sum().backward()
            for name, term in terms.items():
                entry = sums.setdefault(name, [0.0, 0.0])
                entry[0] += float(term.sum.detach())
                entry[1] += float(term.weight)
                coefficients[name] = term.coefficient
        return self._means(sums, coefficients)

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

    def maybe_save(self, step: int, state: Mapping[str, Any], told_to_stop: bool) -> None:
        """Save when it is due. When is due never changes the result, so a clock may say it."""
        if self.store is None or not self.trainer.ranks.first:
            return
        every, now = self.trainer.settings.checkpoint_every, time.monotonic()
        patience = max(SECONDS_BETWEEN_CHECKPOINTS, 20 * self.cost)
        due = step % every == 0 if every else now - self.last > patience
        if told_to_stop or (due and step < self.trainer.steps):
            self.store.save(step, self.parameters, self.optimizers, state)
            self.last = time.monotonic()
            self.cost = self.last - now


class _Progress:
    """What is told while a run goes on, and what is left of it in the end."""

    def __init__(self, trainer: Trainer, restored: tuple[int, Mapping[str, Any]]) -> None:
        self.trainer = trainer
        self.step, state = restored
        self.tokens = int(state.get("tokens", 0))
        self.recent: deque[float] = deque(state.get("recent", ()), maxlen=RECENT)
        self.skipped, self.bad = int(state.get("skipped", 0)), int(state.get("bad", 0))
        self.scale = LossScale(trainer.settings.dtype, state.get("loss_scale"), int(state.get("whole_steps", 0)))
        self.started, self.timed = 0.0, 0  # from the end of the first step, in which things are compiled
        self.pending: dict[str, list[float]] = {}

    def record(
        self, step: int, measured: dict[str, float], norm: float, rate: float, tokens: int, finite: bool
    ) -> None:
        """One step was made, or skipped because its gradient was not finite."""
        self.tokens += tokens
        if self.started:
            self.timed += tokens
        else:
            self.started = time.monotonic()
        if finite:
            self.bad = 0
            self.recent.append(measured["loss"])
            for name, value in {**measured, "grad_norm": norm}.items():
                self.pending.setdefault(name, []).append(value)
        if not self.scale.update(finite) and not finite:
            self._skip(step)
        done = step + 1
        if done % self.trainer.settings.log_every == 0 or done == self.trainer.steps:
            for name, values in self.pending.items():
                self.trainer.events.metric(name, sum(values) / len(values), done)
            self.trainer.events.metric("lr", rate, done)
            self.trainer.events.metric("tokens_per_second", self.rate, done)
            self.pending = {}
        loss = self.recent[-1] if self.recent else None
        self.trainer.events.progress(done, self.trainer.steps, "steps", loss=loss, tokens_per_second=self.rate)

    def _skip(self, step: int) -> None:
        self.skipped, self.bad = self.skipped + 1, self.bad + 1
        self.trainer.events.message(t("step {step} had no finite gradient and was skipped", step=step + 1), "warning")
        if self.bad >= BAD_STEPS:
            raise FledgeError(
                Problem(
                    t("the training has diverged: {count} steps in a row without a finite gradient", count=self.bad),
                    fix=t("lower the learning rate, lengthen the warm-up, or set dtype to float32"),
                )
            )

    @property
    def rate(self) -> float:
        """Tokens a second since the first step of this attempt."""
        return self.timed / max(1e-9, time.monotonic() - self.started) if self.timed else 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this."""
        counters = {"tokens": self.tokens, "recent": list(self.recent), "skipped": self.skipped, "bad": self.bad}
        return counters | self.scale.state()

    def summary(self) -> dict[str, Any]:
        """The metrics of the whole run."""
        final = sum(self.recent) / len(self.recent) if self.recent else float("nan")
        return {
            "final_loss": final,
            "steps": self.trainer.steps,
            "tokens": self.tokens,
            "tokens_per_second": round(self.rate, 1),
            "skipped_steps": self.skipped,
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
