"""The stage of this room: `train.cross_validate`, K models from one stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Self, get_origin

from pydantic import Field, model_validator

from fledge.core.artifact import Artifact, Model, Records
from fledge.core.draft import Draft, build
from fledge.core.errors import Problem, did_you_mean, listing
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.stage import Estimate, Execution, Size, Stage, all_stages
from fledge.training.estimation import needs

GIVEN = ("data", "held_out")
"""The keys that every fold fills in."""


class CrossValidate(Stage, use="train.cross_validate", version=1):
    """K models from one stage, each trained on all folds but one and measured on that one.

    Its outputs are `1` … `K` (`models.3` is the third), and the metrics of each say the mean and the standard deviation
    over the folds of everything that was measured.
    """

    folds: str = Field("", description="a data.split with folds: its stage's name")
    k: int = Field(0, ge=0, description="how many of them")
    learn: list[Ref[Records]] = Field(
        default_factory=list, description="instead of folds: what each model is trained on, one after another"
    )
    measure: list[Ref[Records]] = Field(default_factory=list, description="and what each of them is measured on")
    stage: dict[str, Any] = Field(description="the stage that is run on each, without its data and held_out")

    @model_validator(mode="after")
    def _name_the_folds(self) -> Self:
        """`folds: folds, k: 5` is `learn: [folds.train_1, …]` and `measure: [folds.1, …]`."""
        if self.folds and self.k and not self.learn and not self.measure:
            numbers = range(1, self.k + 1)
            object.__setattr__(self, "learn", [Ref(f"{self.folds}.train_{n}", (Records,)) for n in numbers])
            object.__setattr__(self, "measure", [Ref(f"{self.folds}.{n}", (Records,)) for n in numbers])
        return self

    def inner(self, fold: int) -> tuple[Stage | None, list[Problem]]:
        """The stage of a fold (from 0), or why it cannot be."""
        use, able = str(self.stage.get("use", "")), {n: each for n, each in all_stages().items() if _takes_folds(each)}
        cls = able.get(use)
        if cls is None:
            what = t('"{use}" cannot be run fold by fold', use=use)
            return None, [Problem(what, "stage.use", use, listing(list(able), 40), did_you_mean(use, able))]
        draft = Draft("", {})
        values = {name: value for name, value in self.stage.items() if name not in ("use", "version")}
        built = build(cls, {**values, "data": self.learn[fold].text, "held_out": self.measure[fold].text}, (), draft)
        return built, [
            Problem(p.what, f"stage.{p.where.strip(' ()')}", p.found, p.allowed, p.fix) for p in draft.problems
        ]

    def check(self) -> Iterator[Problem]:
        if len(self.learn) < 2 or len(self.learn) != len(self.measure):
            yield Problem(
                t("there must be two folds or more"), where="folds", found=f"{len(self.learn)}, {len(self.measure)}",
                fix=t("for example: {example}", example="{folds: folds, k: 5}"),
            )  # fmt: skip
            return
        for name in GIVEN:
            if name in self.stage:
                yield Problem(t("every fold brings its own"), where=f"stage.{name}", fix=t("leave it out"))
        built, problems = self.inner(0)
        yield from problems
        if built is not None:
            yield from (Problem(p.what, f"stage.{p.where}", p.found, p.allowed, p.fix) for p in built.check())

    def check_execution(self, execution: Execution) -> Iterator[Problem]:
        built = self.inner(0)[0] if self.learn and self.measure else None
        yield from built.check_execution(execution) if built else ()

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        built = self.inner(0)[0]
        yield from built.advice(sizes) if built else ()

    def references(self) -> dict[str, Ref[Any]]:
        """Those of the folds, and those of the stage that is run on them (`stage.model`)."""
        found = super().references()
        built = self.inner(0)[0] if self.learn and self.measure else None
        inner = built.references() if built else {}
        for own, given in zip(("learn", "measure"), GIVEN, strict=True):  # of the kinds that the stage takes
            kinds = next((ref.kinds for key, ref in inner.items() if key.partition(".")[0] == given), (Records,))
            found |= {key: Ref(ref.text, kinds) for key, ref in found.items() if key.partition(".")[0] == own}
        return found | {f"stage.{key}": ref for key, ref in inner.items() if key.partition(".")[0] not in GIVEN}

    def config_values(self) -> dict[str, Any]:
        """The stage's own defaults and version are part of what a fold is; what the folds' stage is called is not."""
        values = super().config_values() | ({"folds": "", "k": 0} if self.learn else {})
        built = self.inner(0)[0] if self.learn and self.measure else None
        if built is not None:
            own = {name: value for name, value in built.config_values().items() if name not in GIVEN}
            values["stage"] = {"use": built.use, "version": built.version, **own}
        return values

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        built = self.inner(0)[0] if self.learn and self.measure else None
        kind = next(iter(built.output_kinds().values())) if built else Model
        return {str(number): kind for number in range(1, len(self.learn) + 1)}

    def run(self, job: Job) -> dict[str, Artifact]:
        from fledge.training.strategies.folds import cross_validate

        return cross_validate(self, job)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        found = [built.estimate(sizes, machine) for fold in range(len(self.learn)) if (built := self.inner(fold)[0])]
        made = {str(number): each.sizes.get("", Size()) for number, each in enumerate(found, 1)}
        return replace(
            needs.hungriest(found), disk=2 * sum(each.disk for each in found), sizes=made,
            seconds=(sum(each.seconds[0] for each in found), sum(each.seconds[1] for each in found)),
        )  # fmt: skip


def _takes_folds(stage: type[Stage]) -> bool:
    """Whether a stage learns from `data` and is measured on one `held_out` part."""
    fields = stage.model_fields
    return (
        all(name in fields for name in GIVEN)
        and "Ref[" in str(held := fields["held_out"].annotation)
        and (get_origin(held) is not dict)
    )
