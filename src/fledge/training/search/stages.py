"""The stage of this room: a rate range test of any stage that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, ValidationError

from fledge.core.artifact import Study
from fledge.core.errors import Problem, did_you_mean
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.stage import Estimate, Size, Stage, all_stages


def _read(value: object) -> Stage:
    """A stage as a recipe writes it, `{use: train.sft, …}`; it must have the settings of a training."""
    if isinstance(value, Stage):
        return value
    fields = dict(value) if isinstance(value, Mapping) else {}
    use, known = fields.pop("use", None), all_stages()
    trains = [name for name, stage in known.items() if "train" in stage.model_fields]
    if use not in trains:
        hint = did_you_mean(str(use), trains)
        raise ValueError(
            t("is not a stage that trains: {known}", known=", ".join(trains)) + (f" ({hint})" if hint else "")
        )
    try:
        return known[str(use)].model_validate(fields)
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError("; ".join(found)) from None


def _write(stage: Stage) -> dict[str, Any]:
    return {"use": stage.use, **stage.config_values()}


TrainingStage = Annotated[Any, PlainValidator(_read), PlainSerializer(_write)]
"""A stage within a stage, with its references."""


class RateRange(Stage, use="search.rate_range", version=1):
    """The loss of a training while its learning rate rises exponentially (Smith, 2017): which rates are too low, which
    too high, and one to begin with. What it trains is thrown away."""

    of: TrainingStage = Field(
        description="the stage whose rate is sought, as it would stand in the recipe: {use: …, …}"
    )
    lowest: float = Field(1e-6, gt=0, description="the rate of the first step")
    highest: float = Field(1.0, gt=0, description="the rate of the last step, unless the loss has burst before")
    steps: int = Field(100, ge=20, description="optimiser steps")
    smoothing: float = Field(0.9, ge=0, lt=1, description="share of the past in the smoothed loss")
    burst: float = Field(4.0, gt=1, description="stop where the smoothed loss is so many times its lowest")

    def run(self, job: Job) -> Study:
        from fledge.training.search.rate_range import rate_range

        return rate_range(self, job)

    def check(self) -> Iterator[Problem]:
        if self.lowest >= self.highest:
            yield Problem(t("the lowest rate lies above the highest"), where="lowest", found=f"{self.lowest:g}")
        for problem in self.of.check():
            where = ".".join(filter(None, ("of", problem.where)))
            yield Problem(problem.what, where, problem.found, problem.allowed, problem.fix)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        from fledge.training.search.rate_range import ramped

        whole = ramped(self).estimate(sizes, machine)
        return replace(whole, disk=1e5, sizes={})
