"""The Trainer: one loop for every objective. It reads from top to bottom in `fit`.

Resuming is exact: a batch is a pure function of its step, and so is the randomness of the step (dropout), so a
checkpoint needs nothing but weights, optimiser state and a few counters.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fledge.core.artifact import digest_of
from fledge.core.errors import FledgeError, Problem
from fledge.core.events import Emitter
from fledge.core.language import t
from fledge.training.checkpoints.saver import Saver
from fledge.training.layout.ranks import Ranks
from fledge.training.objective import Batch, BatchSource, Objective, Term, as_batch, rows_of, take
from fledge.training.optimization.optimizer import build_optimizers, clip, set_lr
from fledge.training.optimization.schedule import lr_factor
from fledge.training.progress import Progress
from fledge.training.settings import TrainSettings
from fledge.training.stability.diagnosis import out_of_memory, worse_on_held_out


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
        saver = Saver(self, parameters, optimizers)
        progress = Progress(self, saver.restore())
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

    def _on_held_out(self, step: int, progress: Progress) -> float:
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
