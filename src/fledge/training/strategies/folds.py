"""K models from one stage: every fold in its turn, kept as it is finished, and the metrics of all of them together."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.artifact import KINDS, Artifact, write_atomic
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.language import t

if TYPE_CHECKING:
    from fledge.training.strategies.stages import CrossValidate

DONE = "fold.json"


def cross_validate(stage: CrossValidate, job: Job) -> dict[str, Artifact]:
    """Run the stage on every fold; its models by the fold's number. A fold that was finished is not run again."""
    made: dict[str, Artifact] = {}
    for number in range(1, len(stage.learn) + 1):
        folder = job.work / f"{job.work.name}-fold-{number}"  # unique where checkpoints are kept together
        if not (folder / DONE).is_file():
            job.events.message(t("fold {number} of {count}", number=number, count=len(stage.learn)))
            _run(stage, number, folder, job)
        if job.rank == 0:
            shutil.copytree(folder / "out", job.out / str(number), copy_function=os.link)
            told = json.loads((folder / DONE).read_text(encoding="utf-8"))
            made[str(number)] = KINDS[told["kind"]](job.out / str(number), told["metrics"])
    together = over_folds([artifact.metrics for artifact in made.values()])
    return {name: type(each)(each.path, {**each.metrics, **together}) for name, each in made.items()}


def _run(stage: CrossValidate, number: int, folder: Path, job: Job) -> None:
    """One fold in a folder of its own; `fold.json` is written last, and says that it is whole."""
    built, _ = stage.inner(number - 1)
    assert built is not None  # the recipe was checked
    if job.rank == 0:
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir(parents=True)
    own = replace(job, out=folder / "out", work=folder, events=_told(job, number, len(stage.learn)))
    artifact = built.run(own)
    if job.rank == 0:
        told = {"kind": artifact.kind, "metrics": dict(artifact.metrics)}
        write_atomic(folder / DONE, json.dumps(told, default=lambda value: value.item()))


def _told(job: Job, number: int, count: int) -> Emitter:
    """The fold's events as the stage's own: its curves by the fold's number, its progress as a part of the whole."""

    def send(event: Event) -> None:
        match event.kind:
            case "metric" if not event.name.startswith("rate/"):
                job.events.metric(f"fold_{number}/{event.name}", event.value, event.step)
            case "metric":
                job.events.metric(event.name, event.value, event.step)
            case "progress" if event.data.get("total"):
                rest = {key: value for key, value in event.data.items() if key != "total"}
                done = number - 1 + event.value / event.data["total"]
                job.events.progress(round(done, 3), count, "folds", **rest)
            case "message":
                job.events.message(event.value, "warning" if event.name == "warning" else "info")
            case "sample":
                job.events.sample(event.data.get("prompt", ""), event.value, event.step)
            case _:
                pass

    return Emitter(job.name, job.attempt, send)


def over_folds(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`folds`, and of every number that all folds measured `NAME_mean` and `NAME_sd` (of a sample: n − 1)."""
    shared = [
        name for name in (metrics[0] if metrics else {})
        if all(isinstance(each.get(name), (int, float)) and not isinstance(each[name], bool) for each in metrics)
    ]  # fmt: skip
    found: dict[str, Any] = {"folds": len(metrics)}
    for name in shared:
        values = [float(each[name]) for each in metrics]
        mean = math.fsum(values) / len(values)
        spread = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
        found |= {f"{name}_mean": mean, f"{name}_sd": math.sqrt(spread)}
    return found
