"""The third noun. A stage is one pydantic class: config schema, reference page, command-line flags, estimate and code.

    class SFT(Stage, use="train.sft", version=1):
        '''Supervised fine-tuning on conversations, with the loss on the assistant's turns only.'''

        model: Ref[Model] = Field(description="what to start from")
        lr: float = Field(2e-5, gt=0, description="peak learning rate")

        def run(self, job: Job) -> Model: ...

The module of a schema imports nothing heavy (no torch, transformers, pyarrow): `run` imports what it needs.
Raise `version` whenever the same config gives another payload; a golden test fails when one forgets.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fledge.core.artifact import KINDS, Artifact
from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.core.reference import FirstOf, Ref, Source

if TYPE_CHECKING:
    from fledge.core.job import Job

MODULES = (
    "fledge.models.stages",
    "fledge.data.stages",
    "fledge.data.tokens.stages",
    "fledge.data.judges.stages",
    "fledge.data.crawl.stages",
    "fledge.inference.retrieval.stages",
    "fledge.training.stages",
    "fledge.training.understanding.stages",
    "fledge.training.search.stages",
    "fledge.training.scaling.stages",
    "fledge.training.strategies.stages",
    "fledge.evaluation.stages",
    "fledge.alignment.stages",
    "fledge.compression.stages",
)
"""Where stages live. Plug-ins add theirs: the entry-point group `fledge.stages`, or `FLEDGE_STAGES=module,module`."""


class Config(BaseModel):
    """Base of every schema: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), arbitrary_types_allowed=True)

    extras: ClassVar[Mapping[str, str]] = {}
    """importable module → extra that brings it, checked before anything starts (a property, where values decide)"""

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, values: object) -> object:
        """Where a list is wanted, one value may stand alone: `data: split.train`."""
        if not isinstance(values, dict):
            return values
        lists = {name for name, info in cls.model_fields.items() if typing.get_origin(info.annotation) is list}
        return {
            key: [value] if key in lists and value is not None and not isinstance(value, list) else value
            for key, value in values.items()
        }


LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "ddp": {},
    "zero1": {"replicate": 1, "shard": 0, "zero": 1},
    "zero2": {"replicate": 1, "shard": 0, "zero": 2},
    "zero3": {"replicate": 1, "shard": 0, "zero": 3},
    "fsdp": {"replicate": 1, "shard": 0, "zero": 3},
    "hsdp": {"replicate": 2, "shard": 0, "zero": 3},
}
"""Layouts that have a name in the field."""


class Layout(Config):
    """How a training run is divided among processes: their number is the product of the five."""

    replicate: Annotated[int, Field(ge=0)] = 0
    """whole copies of the model, each with its share of the rows; 0: as many as are left"""
    shard: Annotated[int, Field(ge=0)] = 1
    """processes that divide a copy's state among them (FSDP2), each with its share of the rows; 0: what is left"""
    tensor: Annotated[int, Field(ge=1)] = 1
    """processes that divide every matrix, the sequence between them, and the vocabulary (same rows)"""
    pipeline: Annotated[int, Field(ge=1)] = 1
    """processes that divide the layers (same rows)"""
    context: Annotated[int, Field(ge=1)] = 1
    """processes that divide the tokens of every row, and the state as `shard` does; graphics cards only"""
    zero: Literal[1, 2, 3] = 3
    """what is divided by `shard`: 1 the optimiser's state, 2 the gradients too, 3 the weights too"""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """the order of a pipeline's work"""

    @model_validator(mode="after")
    def _one_takes_what_is_left(self) -> Self:
        if self.replicate == 0 and self.shard == 0:
            raise ValueError("either replicate or shard takes what is left: name the other")
        return self

    def resolve(self, processes: int) -> Layout:
        """The same with every number said. Raises FledgeError when no product of them is `processes`."""
        given = self.tensor * self.pipeline * self.context * (self.replicate or 1) * (self.shard or 1)
        left, rest = divmod(processes, given)
        if rest or (left != 1 and self.replicate and self.shard):
            raise FledgeError(
                Problem(
                    t("the layout does not make up the number of processes"),
                    where="execution.layout",
                    found=t("{given} in the layout, {processes} processes", given=given, processes=processes),
                    fix=t("processes = replicate × shard × tensor × pipeline × context; leave replicate out, or set it"
                          " to 0, and it takes what is left"),
                )
            )  # fmt: skip
        return self.model_copy(update={"replicate": self.replicate or left, "shard": self.shard or left})

    def needing_more(self, found: str) -> Iterator[Problem]:
        """What speaks against it where a loss needs more than the last hidden state of every token."""
        for key, what in (
            ("pipeline", t("this stage needs more than the last layers give: it cannot be a pipeline")),
            ("context", t("this stage's loss needs whole rows: their tokens cannot be divided")),
        ):
            if getattr(self, key) > 1:
                fix = t("divide by shard or tensor instead")
                yield Problem(what, where=f"execution.layout.{key}", found=found, fix=fix)


def _named_layout(value: object) -> object:
    """`layout: zero3` instead of the numbers; anything unknown is left for the schema to refuse."""
    return dict(LAYOUTS[value]) if isinstance(value, str) and value in LAYOUTS else value


def _yaml_switch(value: object) -> object:
    """YAML reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _can_be_written(url: str) -> str:
    if url.startswith(("http://", "https://")):
        raise ValueError(t("a web page cannot be written to: name a folder or an object store (s3://bucket/key)"))
    return url


class Execution(Config):
    """How a stage is carried out. Recorded with the artifact, not part of its fingerprint."""

    device: str = "auto"
    """auto, cpu, cuda, mps"""
    processes: Annotated[int, Field(ge=1)] = 1
    """more than one starts torchrun"""
    threads: Annotated[int, Field(ge=0)] = 0
    """threads per process; 0 takes all cores"""
    micro_batch: Annotated[int, Field(ge=0)] = 0
    """rows at once; 0 lets the stage choose"""
    workers: Annotated[int, Field(ge=0)] = 0
    """processes among which a data stage divides its shards; 0 takes all cores"""
    executor: Literal["local", "ray"] = "local"
    """where those processes are: on this machine, or on the Ray cluster that RAY_ADDRESS names"""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_yaml_switch)] = "auto"
    """auto, on, off: torch.compile where a C++ compiler is there and the run is long enough"""
    layout: Annotated[Layout, BeforeValidator(_named_layout)] = Layout()
    """how a training is divided among its processes: numbers, or ddp, zero1, zero2, zero3, fsdp, hsdp"""
    activation_checkpointing: Annotated[Literal["on", "off"], BeforeValidator(_yaml_switch)] = "off"
    """on: a layer's activations are computed again for the backward pass instead of being kept"""
    memory_check: Annotated[Literal["on", "off"], BeforeValidator(_yaml_switch)] = "on"
    """off: a training is started even if it is known not to fit into memory"""
    checkpoints: Annotated[str, AfterValidator(_can_be_written)] = ""
    """where a training keeps its checkpoints: a folder or the URL of an object store (s3://bucket/key), below which
    each stage has a folder of its own; empty: in the stage's work folder"""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """so many of a training's checkpoints are kept"""


@dataclass(frozen=True)
class Size:
    """How big an artifact is or will be, as far as one knows before it is made."""

    rows: float = 0
    bytes: float = 0  # of text, or of files
    tokens: float = 0
    parameters: float = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    """a model's `config.json`, where there is one already"""


@dataclass(frozen=True)
class Estimate:
    """What a stage will need. `seconds` and `memory` are ranges (low, high); `memory` and `disk` in bytes."""

    seconds: tuple[float, float]
    memory: tuple[float, float] = (0.3e9, 0.6e9)
    disk: float = 1e6
    sizes: Mapping[str, Size] = field(default_factory=dict)  # by output name; "" for a single output
    notes: tuple[str, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    """bytes of memory by part, of one device"""
    flops: float = 0.0
    """floating-point operations of a training"""
    available: float = 0.0
    """bytes of memory that there are for it, on one device"""
    too_large: Problem | None = None
    """why it cannot fit, and what would make it fit: such a run is not started"""


class Stage(Config):
    """One step of a model's life. `outputs` names the parts of its artifact; {"": kind} when there is one."""

    use: ClassVar[str] = ""
    version: ClassVar[int] = 0
    outputs: ClassVar[Mapping[str, type[Artifact]]] = {}
    same_kind_as: ClassVar[str] = ""
    """the key of a reference: every output then has the kind of what it points at"""

    def __init_subclass__(cls, use: str = "", version: int = 0, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if use:
            cls.use, cls.version = use, version

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        """Every output by its part's name; "" alone when there is one. Overridden where kinds depend on the config."""
        if self.outputs:
            return self.outputs
        annotation = type(self).run.__annotations__["return"]  # a string: postponed annotations stay unevaluated
        name = annotation if isinstance(annotation, str) else annotation.__name__
        return {"": next(kind for kind in KINDS.values() if kind.__name__ == name)}

    def run(self, job: Job) -> Any:
        """Do the work: write below `job.out`, return the artifact (or one per output name)."""
        raise FledgeError(t("stage {use} cannot be run", use=self.use))

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        """What the stage will need, from the sizes of its inputs (by reference text)."""
        return Estimate(seconds=(1, 30))

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        """What is unusual in the config, a sentence each: it is shown with the plan and refuses nothing."""
        return iter(())

    def check(self) -> Iterator[Problem]:
        """What the schema cannot say: relations between fields. `where` is filled in by the recipe."""
        return iter(())

    @property
    def pipelines(self) -> bool:
        """Whether a pipeline of processes can carry it out, or several that divide the tokens of a row: of each token,
        its loss needs the last hidden state."""
        return False

    def check_execution(self, execution: Execution) -> Iterator[Problem]:
        """What speaks against carrying it out so, as far as is known before it runs."""
        if execution.processes > 1:
            try:
                layout = execution.layout.resolve(execution.processes)
            except FledgeError as error:
                yield from error.problems
                return
            if not self.pipelines:
                yield from layout.needing_more(self.use)

    def references(self) -> dict[str, Ref[Any]]:
        """Every reference in the config by its dotted key."""
        return {key: value for key, value in walk(self) if isinstance(value, Ref)}

    def outside_sources(self) -> dict[str, Source | FirstOf]:
        """Everything that can only come from outside, by its dotted key."""
        return {key: value for key, value in walk(self) if isinstance(value, (Source, FirstOf))}

    def config_values(self) -> dict[str, Any]:
        """The whole config as JSON values, references and sources as their texts."""
        return self.model_dump(mode="json")


def walk(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf below a config with its dotted key: `models.base`, `data.0`."""
    dotted = f"{prefix}." if prefix else ""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from walk(getattr(value, name), dotted + name)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from walk(item, dotted + str(name))
    elif isinstance(value, (list, tuple)) and not isinstance(value, FirstOf):
        for index, item in enumerate(value):
            yield from walk(item, f"{dotted}{index}")
    else:
        yield prefix, value


@cache
def all_stages() -> dict[str, type[Stage]]:
    """Every stage there is, by its `use`. Importing a floor's `stages` module is cheap by rule."""
    from importlib.metadata import entry_points

    named = os.environ.get("FLEDGE_STAGES", "").split(",")
    for name in [*MODULES, *(point.value for point in entry_points(group="fledge.stages")), *filter(None, named)]:
        importlib.import_module(name)
    found: dict[str, type[Stage]] = {}
    pending = list(Stage.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.use:
            found[cls.use] = cls
    return dict(sorted(found.items()))


def stage_class(use: str) -> type[Stage]:
    """The class that `use:` names."""
    stages = all_stages()
    if use not in stages:
        raise FledgeError(
            Problem(
                t('there is no stage "{use}"', use=use),
                allowed=listing(list(stages), 40),
                fix=did_you_mean(use, stages),
            )
        )
    return stages[use]
