"""Trainings without a model: a bowl in two settings, a step at a time. Known to children as `FLEDGE_STAGES`."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from pydantic import Field

from fledge.core.artifact import Scores, write_atomic
from fledge.core.errors import FledgeError
from fledge.core.job import Job
from fledge.core.reference import Ref
from fledge.core.stage import Config, Stage


class Settings(Config):
    """Of the bowl."""

    lr: float = Field(0.1, gt=0, description="best at 0.003")
    batch_size: int = Field(8, gt=0, description="best at 16")


class Prepare(Stage, use="toy.prepare", version=1):
    """What no setting reaches."""

    def run(self, job: Job) -> Scores:
        note("prepare")
        (job.out / "scores.json").write_text("{}", encoding="utf-8")
        return Scores(job.out, {})


class Bowl(Stage, use="toy.bowl", version=1):
    """Twenty steps down to (log10 lr + 2.52)² + (log2 batch − 4)²."""

    data: Ref[Scores] = Field(description="what it waits for")
    train: Settings = Field(default_factory=Settings, description="the two settings")
    pause: float = Field(0.0, description="seconds between two steps")
    fail_above: float = Field(1.0, description="the rate above which it fails")

    def run(self, job: Job) -> Scores:
        state = job.work / "state.json"
        step = json.loads(state.read_text()) if state.exists() else 0
        note(f"begin {self.train.lr:g} {self.train.batch_size} at {step}")
        floor = (math.log10(self.train.lr) + 2.52) ** 2 + (math.log2(self.train.batch_size) - 4) ** 2
        if self.train.lr > self.fail_above:
            raise FledgeError("the rate is far too high")
        while step < 20:
            step += 1
            write_atomic(state, json.dumps(step))
            job.events.progress(step, 20, "steps")
            job.events.metric("loss", floor + 5 / step, step)
            time.sleep(self.pause)
        note(f"end {self.train.lr:g} {self.train.batch_size}")
        (job.out / "scores.json").write_text(json.dumps(floor), encoding="utf-8")
        return Scores(job.out, {"floor": floor, "deep": {"negative": -floor}, "words": "none"})


def note(text: str) -> None:
    """A line that outlives the child."""
    with Path(os.environ["TOY_NOTES"]).open("a", encoding="utf-8") as stream:
        stream.write(text + "\n")
