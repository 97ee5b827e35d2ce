"""The Trainer: one loop for every objective. It reads from top to bottom in `fit`.

Resuming is exact: a batch is a pure function of its step, and so is the randomness of the step (dropout), so a
checkpoint needs nothing but weights, optimiser state and a few counters.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fledge.core.artifact import digest_of
from fledge.core.errors import FledgeError, Problem
from fledge.core.events import Emitter
from fledge.core.language import t
from fledge.training.checkpoints.saver import Saver, Stopped
from fledge.training.kernels import fast_kernels
from fledge.training.layout.ranks import Ranks
from fledge.training.layout.spread import Spread
from fledge.training.monitoring.sources import Means, expected
from fledge.training.objective import Batch, BatchSource, Objective, Term, as_batch, rows_of
from fledge.training.optimization.optimizer import build_optimizers, set_lr
from fledge.training.optimization.schedule import lr_factor
from fledge.training.progress import Progress
from fledge.training.settings import TrainSettings
from fledge.training.stability.diagnosis import out_of_memory, smaller
from fledge.training.stability.judge import require_finite
from fledge.training.strategies.constraints import Constraints
from fledge.training.strategies.penalty import Penalty


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
    checkpoints: Path | str | None = None
    """a folder, or a URL of an object store"""
    micro_batch: int = 0
    ranks: Ranks = field(default_factory=Ranks)
    device: str = "cpu"
    activation_checkpointing: bool = False
    held_out_loss: Callable[[], float] | None = None
    """measured every `evaluate_every` steps"""
    penalties: Sequence[Penalty] = ()
    """what holds the weights near where they begin, beside the `l2_sp` of the settings"""
    keep_last: int = 2
    """so many checkpoints are kept"""
    spread: Spread = field(init=False)
    """the models as this process holds them"""
    stop: threading.Event = field(init=False, default_factory=threading.Event)
    """set by SIGTERM"""

    def __post_init__(self) -> None:
        problems = list(self.ranks.layout.needing_more(type(self.objective).__name__))
        if problems and not self.objective.pipelines:
            raise FledgeError(*problems)
        self.spread = Spread(self.models, self.objective.trainable, Ranks(), self.device)  # until `fit` divides them

    def fit(self) -> dict[str, Any]:
        """Train; the models are changed in place. Gives the final loss, tokens seen and tokens a second.

        Goes on from the newest whole checkpoint. Raises FledgeError when the run goes astray more often than it may
        return, and when a step does not fit into memory.
        """
        trained: list[Any] = [self.models[name] for name in self.objective.trainable]
        optimizers = build_optimizers(trained, self.settings)
        self.spread = spread = Spread(
            self.models, self.objective.trainable, self.ranks, self.device, optimizers, self._autocast
        )
        trained, parameters = [model for _, model in spread.held], spread.parameters()
        constraints = Constraints(self, parameters)
        saver = Saver(self, parameters, optimizers)
        progress = Progress(self, saver.restore())
        scale, stability, best = progress.scale, progress.stability, progress.best
        require_finite(parameters)
        saver.save_first(progress.step, progress.state())
        self._prepare(trained)

        with fast_kernels(spread.modules, self.device, self.settings.dtype), saver, _until_told_to_stop() as self.stop:
            step = progress.step
            while step < self.steps and not best.exhausted:
                rate = set_lr(optimizers, lr_factor(step, self.steps, self.settings))
                with progress.monitor.waiting():
                    batch = as_batch(self.source.batch(step + stability.shift), self.device)
                constraints.begin(step)
                progress.statistics.begin(step)
                measured = self._accumulate(batch, step, scale.value)
                scale.unscale(spread.sum_gradients())
                measured |= constraints.shape(step)
                progress.statistics.gradients(parameters)
                norm = spread.clip(self.settings.grad_clip)
                trouble = stability.judge(measured["loss"], norm)
                if not trouble:
                    for optimizer in optimizers:
                        optimizer.step()
                    progress.statistics.updated(parameters)
                for parameter in parameters.values():
                    parameter.grad = None
                progress.record(step, measured, norm, rate, batch, trouble)
                step = saver.return_from(step + 1, progress) if stability.astray else step + 1
                if best.due(step) and not trouble:
                    best.measured(step, self._on_held_out(step, progress), saver)
                if saver.maybe_save(step, progress.state(), told_to_stop=self.stop.is_set()):
                    raise SystemExit(143)
        self.ranks.wait()
        best.restore(step, saver)
        constraints.end()
        spread.restore()
        for model in trained if self.activation_checkpointing else ():
            model.gradient_checkpointing_disable()
        for model in self.models.values():
            model.eval()
        return progress.summary(step)

    def _prepare(self, trained: list[Any]) -> None:
        """Models that are trained in training mode, if the objective has them drop out; the others as they answer."""
        for model in self.models.values():
            model.eval()
        for model in trained:
            model.train(self.objective.dropout)
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
        # of other shapes than the steps: nothing is compiled for a glance at them
        with self.spread.whole(), torch.compiler.set_stance("force_eager"):
            value = self.held_out_loss()
        for name, model in self.models.items():
            model.train(before[name])
        progress.held_out(step, value)
        return value

    def _accumulate(self, batch: Batch, step: int, scale: float = 1.0) -> dict[str, float]:
        """Gradients of the whole batch times `scale`, a micro-batch at a time; the terms' values over all rows and
        ranks."""
        totals = self.objective.weights(batch)
        rows = self.micro_batch if self.objective.rows_independent else 0
        sums = expected(batch, getattr(self.source, "sources", ()))
        coefficients: dict[str, float] = {}
        self._reseed(step)
        try:
            for terms in self.spread.backward(partial(self._loss, totals, scale), batch, rows):
                if self.stop.is_set() and self.ranks.world == 1:
                    raise Stopped  # of several processes, all finish the step in hand
                for name, term in terms.items():
                    entry = sums.setdefault(name, [0.0, 0.0])
                    entry[0] += float(term.sum.detach())
                    entry[1] += float(term.weight)
                    coefficients[name] = term.coefficient
        except (RuntimeError, MemoryError) as error:
            raise (self._too_large(error, batch, rows or rows_of(batch)) or error) from None
        return self._means(*self.spread.sum_terms(sums, coefficients))

    def _loss(
        self, totals: Mapping[str, float], scale: float, models: Mapping[str, Any], micro: Batch
    ) -> tuple[torch.Tensor | None, dict[str, Term]]:
        """What to go down from for some rows, times `scale`, and the terms; None where no term has a coefficient."""
        with self._autocast():
            terms = self.objective.loss(self.objective.forward(models, micro), micro)
        parts = [
            term.sum * (scale * term.coefficient / totals[name])
            for name, term in terms.items()
            if term.coefficient and totals[name]
        ]
        return torch.stack(parts).sum() if parts else None, terms

    def _means(self, sums: dict[str, list[float]], coefficients: dict[str, float]) -> dict[str, float]:
        """Every term's mean, and `loss`, their weighted sum."""
        means = {name: s / w if w else 0.0 for name, (s, w) in sums.items()}
        loss = sum(coefficients[name] * value for name, value in means.items() if coefficients.get(name))
        return Means({**means, "loss": loss}, {name: weight for name, (_, weight) in sums.items()})

    def _too_large(self, error: BaseException, batch: Batch, rows: int) -> FledgeError | None:
        """What to say when a step did not fit into memory; None for another error."""
        frozen = any(not p.requires_grad for name in self.objective.trainable for p in self.models[name].parameters())
        return out_of_memory(error, rows, self.activation_checkpointing, frozen, partial(smaller, self, batch))

    def _reseed(self, step: int) -> None:
        """What is random in a step depends on the seed, the step and the rank alone."""
        torch.manual_seed(int(digest_of([self.seed, step, self.ranks.rank])[:15], 16))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=getattr(torch, self.settings.dtype))


@contextmanager
def _until_told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: the micro-batch in hand is finished, and a checkpoint written before we leave."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
