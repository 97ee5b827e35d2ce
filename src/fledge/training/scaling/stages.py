"""The stage of this room: a scaling law from small runs, and a look at emergence on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from fledge.core.artifact import Model, Records, Study
from fledge.core.errors import Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.stage import Config, Estimate, Size, Stage
from fledge.core.units import Count
from fledge.training.estimation import needs
from fledge.training.search.stages import TrainingStage


class Target(Config):
    """A run larger than the others, on which the law is checked."""

    size: Count = Field(gt=0, description="about how many parameters, embeddings included, as in 2M")
    tokens: Count = Field(gt=0, description="tokens to train on")


class Emergence(Config):
    """A continuous and a thresholded measure of the same runs (Schaeffer et al., 2023)."""

    data: Ref[Records] = Field(description="held-out text")
    lengths: list[int] = Field(
        default_factory=lambda: [1, 2, 4, 8], min_length=1,
        description="so many tokens in a row must all be right: exact match",
    )  # fmt: skip
    texts: int = Field(100, gt=0, description="how many texts, at most")


class Scaling(Stage, use="search.scaling", version=1):
    """Power laws L = E + A/N^α + B/D^β fitted on small runs (Hoffmann et al., 2022), carried on to a larger one with an
    interval, and checked there. The small runs are trained here, or models that are there already."""

    of: TrainingStage | None = Field(
        None, description="the pre-training to repeat, as it would stand in the recipe: {use: train.pretrain, …}"
    )
    sizes: list[Count] = Field(default_factory=list, description="parameters of the small models, as in 0.3M")
    tokens: list[Count] = Field(
        default_factory=list, description="tokens of the small runs; every size is trained on each (default: of's)"
    )
    models: dict[str, Ref[Model]] = Field(
        default_factory=dict, description="finished models by name, beside or instead of small runs"
    )
    check_on: Target | None = Field(None, description="a larger run: trained last, and not fitted to")
    check_model: Ref[Model] | None = Field(None, description="or a larger model that is there")
    metric: str = Field(
        "", description="which of a run's metrics (default: the mean of its bits per byte, else its final loss)"
    )
    level: float = Field(0.9, gt=0.5, lt=1, description="of the intervals")
    samples: int = Field(400, ge=50, description="bootstrap samples")
    emergence: Emergence | None = Field(None, description="measure token loss and exact match of the models, too")

    def run(self, job: Job) -> Study:
        from fledge.training.scaling.study import study

        return study(self, job)

    def check(self) -> Iterator[Problem]:
        if self.of is not None and self.of.use != "train.pretrain":
            yield Problem(t("sizes are those of a pre-training"), where="of", found=self.of.use)
        if (self.of is None) == bool(self.sizes):
            yield Problem(
                t("sizes go with the training to repeat"),
                where="sizes",
                allowed=t("of and sizes, or models alone"),
            )
        if self.check_on and (self.of is None or self.check_model):
            yield Problem(t("the larger run is trained like the small ones, or given, not both"), where="check_on")
        runs = len(self.sizes) * max(1, len(self.tokens)) + len(self.models)
        if runs < 4:
            yield Problem(t("too few runs for a law"), where="sizes", found=str(runs), allowed=t("at least 4"))
        for problem in self.of.check() if self.of is not None else ():
            where = ".".join(filter(None, ("of", problem.where)))
            yield Problem(problem.what, where, problem.found, problem.allowed, problem.fix)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        from fledge.training.scaling.runs import all_runs

        found = [stage.estimate(sizes, machine) for _, stage in all_runs(self)]
        seconds = 2 + sum(e.seconds[0] for e in found), 10 + sum(e.seconds[1] for e in found)
        return replace(needs.hungriest(found), seconds=seconds, disk=1e6, sizes={})
