"""The rate range test (Smith, 2017, section 3.3): one short training whose rate rises from far too low to far too high.

The smoothed loss first stands still, then falls, then rises. Where it falls most steeply (over the logarithm of the
rate) is a good peak for a schedule; a tenth of the rate at its lowest point is the other rule in use. The smaller of
the two is suggested. The test is not resumed but begun anew: it is short, and its curve must be of one piece.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.artifact import Study, write_atomic
from fledge.core.errors import FledgeError, Problem
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.stage import Stage

if TYPE_CHECKING:
    from fledge.training.search.stages import RateRange

FEWEST = 10  # points from which anything can be said
NEITHER_END = 0.1  # share of the points at each end in which no steepest slope is sought


class Enough(Exception):
    """The loss has burst: nothing more is to be learned."""


def rate_range(stage: RateRange, job: Job) -> Study:
    """Train with a rising rate, throw the model away, keep the curve."""
    scratch = job.work / "range"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "out").mkdir(parents=True)
    ear = _Ear(job.events, stage)
    here = job.execution.model_copy(update={"checkpoints": ""})
    inner = replace(job, out=scratch / "out", work=scratch, events=ear, execution=here)
    try:
        ramped(stage).run(inner)
    except Enough:
        pass
    except FledgeError:
        if len(ear.losses) < FEWEST:  # it failed for another reason than its rate
            raise
    shutil.rmtree(scratch, ignore_errors=True)
    rates = [rate_at(step, stage) for step in range(len(ear.losses))]
    found = suggestion(rates, ear.smoothed)
    if job.rank == 0:
        points = [list(point) for point in zip(rates, ear.losses, ear.smoothed, strict=True)]
        study = {"study": "rate range", "columns": ["lr", "loss", "smoothed_loss"], "points": points, **found}
        write_atomic(job.out / "study.json", json.dumps(study, indent=1) + "\n")
        plot(rates, ear.losses, ear.smoothed, found["suggested_lr"], job.out / "study.svg")
    return Study(job.out, {**found, "steps": len(rates), "burst": len(rates) < stage.steps})


def ramped(stage: RateRange) -> Stage:
    """The stage with a rising rate, as many steps as asked for, and nothing that is measured beside its loss."""
    inner: Stage = stage.of
    train = inner.train  # type: ignore[attr-defined]
    scale = stage.highest / train.lr
    train = train.model_copy(
        update={
            "lr": stage.highest, "muon_lr": train.muon_lr * scale, "min_lr_ratio": stage.lowest / stage.highest,
            "schedule": "ramp", "warmup": 0.0, "steps": stage.steps, "log_every": 1, "evaluate_every": 0,
            "patience": 0, "rollbacks": 0, "spike_sigmas": 0.0,
        }
    )  # fmt: skip
    update: dict[str, Any] = {"train": train}
    if "held_out" in type(inner).model_fields:
        update["held_out"] = type(inner).model_fields["held_out"].get_default(call_default_factory=True)
    if {"tokens", "seq_len"} <= type(inner).model_fields.keys():  # pre-training counts tokens, not steps
        update["tokens"] = stage.steps * train.batch_size * inner.seq_len  # type: ignore[attr-defined]
    return inner.model_copy(update=update)


def rate_at(step: int, stage: RateRange) -> float:
    """The rate of a step (from 0): equal steps in the logarithm, the last one at the highest."""
    return float(stage.highest * (stage.lowest / stage.highest) ** (1 - min(1.0, (step + 1) / stage.steps)))


def suggestion(rates: Sequence[float], smoothed: Sequence[float]) -> dict[str, float]:
    """Where the smoothed loss falls most steeply, where it is lowest, and the rate to begin with.

    Raises FledgeError where the loss never falls.
    """
    lowest = min(range(len(smoothed)), key=lambda i: smoothed[i]) if smoothed else 0
    first = round(NEITHER_END * len(rates))
    slopes = {
        i: (smoothed[i + 1] - smoothed[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(max(1, first), min(lowest + 1, len(rates) - 1))
    }
    steepest = min(slopes, key=lambda i: slopes[i], default=0)
    if len(rates) < FEWEST or not slopes or slopes[steepest] >= 0:
        raise FledgeError(
            Problem(
                t("the loss falls at none of these rates"),
                found=f"{rates[0]:.2g} … {rates[-1]:.2g}" if rates else "",
                fix=t("begin lower, take more steps, or look at the data"),
            )
        )
    suggested = min(rates[steepest], rates[lowest] / 10)
    return {"suggested_lr": float(f"{suggested:.2g}"), "steepest_lr": rates[steepest], "lowest_loss_lr": rates[lowest]}


class _Ear(Emitter):
    """Passes a stage's events on, keeps its losses, and calls an end to it when they have burst."""

    def __init__(self, inner: Emitter, stage: RateRange) -> None:
        super().__init__(inner.stage, inner.attempt, self._hear)
        self._inner, self._asked = inner, stage
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._mean = 0.0

    def _hear(self, event: Event) -> None:
        self._inner._send(event)
        if event.kind != "metric" or event.name != "loss":
            return
        beta, loss = self._asked.smoothing, float(event.value)
        self._mean = beta * self._mean + (1 - beta) * loss
        self.losses.append(loss)
        self.smoothed.append(self._mean / (1 - beta ** len(self.losses)))
        best = min(self.smoothed)
        if not math.isfinite(loss) or (len(self.losses) > FEWEST and self.smoothed[-1] > self._asked.burst * best > 0):
            raise Enough


def plot(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggested: float, file: Path
) -> None:
    """The curve as SVG, the same bytes for the same numbers."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "fledge", "svg.fonttype": "none"}):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.semilogx(rates, losses, color="0.75", linewidth=1)
        axes.semilogx(rates, smoothed, color="#2a6fbb")
        axes.axvline(suggested, color="#c0392b", linestyle="--", linewidth=1)
        axes.annotate(f"{suggested:.2g}", (suggested, max(smoothed)), color="#c0392b", xytext=(4, -4),
                      textcoords="offset points", va="top")  # fmt: skip
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None})
