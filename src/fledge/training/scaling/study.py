"""`search.scaling`: train the small runs (each once, resumed where it stopped), fit, predict, check, plot."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from fledge.core.artifact import Model, Study, write_atomic
from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.language import t
from fledge.training.scaling.emergence import emergence, measure_runs
from fledge.training.scaling.law import Fit, Point, fit_law
from fledge.training.scaling.plot import plot_law
from fledge.training.scaling.runs import all_runs

if TYPE_CHECKING:
    from fledge.training.scaling.stages import Scaling

RESULT = "point.json"


def study(stage: Scaling, job: Job) -> Study:
    """Run the stage: `study.json` with every point, the law and the check; `study.svg`."""
    made = [_trained(name, run, stage, job, number) for number, (name, run) in enumerate(all_runs(stage))]
    checked = made.pop() if stage.check_on else None
    made += [_given(name, job.open(ref), stage.metric) for name, ref in stage.models.items()]
    if stage.check_model:
        checked = _given("check", job.open(stage.check_model), stage.metric)
    points = [point for point, _ in made]
    fit = fit_law(points, stage.samples, stage.level, job.rng_seed("bootstrap") % 2**32)
    found: dict[str, Any] = {"study": "scaling", **summary(fit)}
    if checked:
        found |= _check(fit, checked[0], job)
    if stage.emergence:
        everything = [*made, *([checked] if checked else [])]
        found |= emergence(measure_runs(everything, stage.emergence, job), stage.emergence.lengths)
    if job.rank == 0:
        write_atomic(job.out / "study.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        plot_law(fit, checked[0] if checked else None, job.out / "study.svg")
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return Study(job.out, {**numbers, "inside": found.get("inside"), "runs": len(points)})


def summary(fit: Fit) -> dict[str, Any]:
    """A fit as plain values: coefficients with their intervals, points with what the law says of them."""
    law = asdict(fit.law)
    return {
        **law,
        "intervals": {name: fit.interval(name) for name, value in law.items() if value},
        "level": fit.level,
        "relative_error": fit.error,
        "points": [{**asdict(p), "predicted": fit.law.loss(p.parameters, p.tokens)} for p in fit.points],
    }


def _check(fit: Fit, point: Point, job: Job) -> dict[str, Any]:
    """The larger run against what the law says of it."""
    said = fit.predict(point.parameters, point.tokens)
    inside = said.low <= point.loss <= said.high
    words = t("inside the interval") if inside else t("outside the interval")
    job.events.message(
        t("the larger run: {measured}, predicted {loss} ({low} to {high}): {words}", measured=f"{point.loss:.4f}",
          loss=f"{said.loss:.4f}", low=f"{said.low:.4f}", high=f"{said.high:.4f}", words=words),
        "info" if inside else "warning",
    )  # fmt: skip
    return {
        "check": asdict(point), "inside": inside, "measured_loss": point.loss,
        "predicted_loss": said.loss, "predicted_low": said.low, "predicted_high": said.high,
    }  # fmt: skip


Run = tuple[Point, Model]


def _trained(name: str, run: Any, stage: Scaling, job: Job, number: int) -> Run:
    """Train one small model in the work folder, unless that was done before."""
    folder = job.work / "runs" / name
    done = folder / RESULT
    if not done.exists():
        if job.rank == 0:
            shutil.rmtree(folder / "out", ignore_errors=True)
            (folder / "out").mkdir(parents=True)
        job.events.message(t("training {name}", name=name))
        inner = replace(
            job, out=folder / "out", work=folder, seed=job.rng_seed("run", number), events=_renamed(job.events, name)
        )
        made = run.run(inner)
        point = _point(name, made.metrics, stage.metric)
        if job.rank == 0:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            write_atomic(done, json.dumps({"point": asdict(point)}))
    return Point(**json.loads(done.read_text(encoding="utf-8"))["point"]), Model(folder / "out")


def _given(name: str, model: Model, metric: str) -> Run:
    """A model that is there, by what its artifact measured."""
    return _point(name, model.metrics or _metrics_of(model), metric), model


def _metrics_of(model: Model) -> Mapping[str, Any]:
    outputs = model.manifest.get("outputs", {})
    return dict(outputs.get("", {}).get("metrics", {}))


def _point(name: str, metrics: Mapping[str, Any], metric: str) -> Point:
    """What a run counts as. Raises FledgeError for one that does not say what is needed."""
    bits = [float(v) for k, v in metrics.items() if k.startswith("bits_per_byte") and isinstance(v, int | float)]
    loss = metrics.get(metric) if metric else sum(bits) / len(bits) if bits else metrics.get("final_loss")
    values = metrics.get("parameters"), metrics.get("tokens"), loss
    if not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values):
        raise FledgeError(
            Problem(
                t("the run says too little for a law"),
                where=name,
                found=listing(sorted(metrics)),
                allowed=f"parameters, tokens, {metric or 'bits_per_byte_…, final_loss'}",
            )
        )
    return Point(*(float(v) for v in values if v is not None), name=name)


def _renamed(events: Emitter, name: str) -> Emitter:
    """A small run's events under its own name: `loss/0.3M-1.0M`."""

    def send(event: Event) -> None:
        own = event.kind == "metric" and not event.name.startswith("rate/")
        events._send(replace(event, name=f"{event.name}/{name}") if own else event)

    return Emitter(events.stage, events.attempt, send)
