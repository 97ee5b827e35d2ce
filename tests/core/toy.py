"""Stages small enough to be run, killed and resumed hundreds of times. They live in a module of their own because the
child process imports them by name (`FLEDGE_STAGES=toy`)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from fledge.core.artifact import Documents, Model, Records, write_atomic
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.reference import FirstOf, Ref, Source
from fledge.core.stage import Config, Stage


class Words(Stage, use="toy.words", version=1):
    """Write numbered lines, a checkpoint after each."""

    count: int = Field(10, gt=0, description="how many")
    sources: list[Source] = Field([], description="files to take in as well")
    pause: float = Field(0.0, description="seconds between two lines")

    def run(self, job: Job) -> Documents:
        state = job.work / "state.json"
        lines = json.loads(state.read_text()) if state.exists() else []
        while len(lines) < self.count:
            lines.append(hashlib.sha256(f"{job.seed} {len(lines)}".encode()).hexdigest())
            write_atomic(state, json.dumps(lines))
            job.events.metric("loss", 1.0 / len(lines), step=len(lines))
            time.sleep(self.pause)
        texts = [job.find(source).path.read_text(encoding="utf-8") for source in self.sources]
        (job.out / "words.txt").write_text("\n".join([*lines, *texts]), encoding="utf-8")
        return Documents(job.out, {"rows": len(lines), "resumed_at": 0})


class Halves(Stage, use="toy.halves", version=1):
    """Split lines in two."""

    data: Ref[Records] = Field(description="what to split")
    outputs: ClassVar = {"first": Records, "second": Records}
    same_kind_as: ClassVar = "data"

    def run(self, job: Job) -> dict[str, Records]:
        given = job.open(self.data)
        lines = (given.path / "words.txt").read_text(encoding="utf-8").splitlines()
        made = {}
        for part, some in (("first", lines[: len(lines) // 2]), ("second", lines[len(lines) // 2 :])):
            (job.out / part).mkdir()
            (job.out / part / "words.txt").write_text("\n".join(some), encoding="utf-8")
            made[part] = type(given)(job.out / part, {"rows": len(some)})
        return made


class Inner(Config):
    """Settings inside settings."""

    lr: float = Field(0.1, gt=0, description="rate")
    schedule: Literal["linear", "cosine"] = Field("linear", description="shape")


class Learn(Stage, use="toy.learn", version=1):
    """Digest what it is given."""

    data: list[Ref[Documents]] = Field(description="what to learn from")
    base: Ref[Model] | None = Field(None, description="what to start from")
    train: Inner = Field(Inner(), description="how")
    fetch: FirstOf | None = Field(None, description="a file from the first place that has it")
    fail: Literal["", "error", "crash", "exit"] = Field("", description="how to fail")

    def check(self) -> Iterator[Problem]:
        if self.base is not None and self.train.lr > 1:
            yield Problem("a rate above 1 destroys the base", where="train.lr")

    def run(self, job: Job) -> Model:
        if self.fail == "error":
            raise FledgeError(Problem("the words are wrong", where="words.txt:3", fix="mend them"))
        if self.fail == "crash":
            raise RuntimeError("something broke inside")
        if self.fail == "exit":
            os._exit(9)
        text = "".join((job.open(ref).path / "words.txt").read_text(encoding="utf-8") for ref in self.data)
        digest = hashlib.sha256(f"{text}{self.train.lr}{self.train.schedule}".encode()).hexdigest()
        (job.out / "config.json").write_text(json.dumps({"digest": digest}), encoding="utf-8")
        return Model(job.out, {"loss": 0.5})


class Where(Stage, use="toy.where", version=1):
    """Say which rank wrote."""

    def run(self, job: Job) -> Documents:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total: Any = torch.tensor(float(job.rank + 1))
        dist.all_reduce(total)
        if job.rank == 0:
            (job.out / "words.txt").write_text(f"{job.world} {total.item()}", encoding="utf-8")
        dist.destroy_process_group()
        return Documents(job.out)
