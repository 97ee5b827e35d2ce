"""The steps of the refinery, by name, and how a recipe names them.

    steps: [normalize, {language: {allowed: [en, zh]}}, quality, exact_dedup, minhash, pii]

Plug-ins add steps by subclassing one of the shapes in `steps.base`, in a module of the entry-point group
`fledge.stages`.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import PlainSerializer, PlainValidator, ValidationError

from fledge.core.errors import did_you_mean
from fledge.core.stage import all_stages
from fledge.data.steps.base import CorpusStep, Filter, RecordStep, Refused, Rejected, Sketches, Step
from fledge.data.steps.check import Check
from fledge.data.steps.classify import Classify
from fledge.data.steps.decontaminate import Decontaminate
from fledge.data.steps.density import Density
from fledge.data.steps.duplicates import ExactDedup, NearDedup, SimHashDedup
from fledge.data.steps.extract import Extract
from fledge.data.steps.harm import Harm
from fledge.data.steps.language import Language
from fledge.data.steps.normalize import Normalize
from fledge.data.steps.perplexity import Perplexity
from fledge.data.steps.pii import PII
from fledge.data.steps.quality import Quality
from fledge.data.steps.repeats import LineDedup, SubstringDedup
from fledge.data.steps.rules import C4Quality, FineWebQuality, GopherQuality, GopherRepetition
from fledge.data.steps.spelling import Spelling
from fledge.data.steps.url import URL

__all__ = [
    "PII",
    "URL",
    "C4Quality",
    "Check",
    "Classify",
    "CorpusStep",
    "Decontaminate",
    "Density",
    "ExactDedup",
    "Extract",
    "Filter",
    "FineWebQuality",
    "GopherQuality",
    "GopherRepetition",
    "Harm",
    "Language",
    "LineDedup",
    "NearDedup",
    "Normalize",
    "Perplexity",
    "Quality",
    "RecordStep",
    "Refused",
    "Rejected",
    "SimHashDedup",
    "Sketches",
    "Spelling",
    "Step",
    "SubstringDedup",
    "all_steps",
    "read_step",
    "write_step",
]

DEFAULT = ("normalize", "language", "quality", "exact_dedup", "minhash", "pii")


def all_steps() -> dict[str, type[Step]]:
    """Every step there is, by name."""
    found: dict[str, type[Step]] = {}
    pending = [Step]
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.name:
            found[cls.name] = cls
    return dict(sorted(found.items()))


def read_step(value: object) -> Step:
    """`minhash` or `{minhash: {threshold: 0.8}}` as a step. Raises ValueError that says what is allowed."""
    if isinstance(value, Step):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("must be the name of a step, or {name: {option: value}}")
    (name, options), steps = next(iter(value.items())), all_steps()
    if name not in steps:
        all_stages()  # plug-ins bring steps
        steps = all_steps()
    if name not in steps:
        raise ValueError(
            f'there is no step "{name}" (there are {", ".join(steps)}) {did_you_mean(str(name), steps)}'.rstrip()
        )
    fields = steps[name].model_fields
    for key in options or {}:
        if key not in fields:
            allowed = ", ".join(fields) or "none"
            raise ValueError(
                f'step {name} has no option "{key}" (it has {allowed}) {did_you_mean(str(key), fields)}'.rstrip()
            )
    try:
        return steps[name](**(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"step {name}, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def write_step(step: Step) -> Any:
    """The inverse of `read_step`, all options spelled out: what a fingerprint is made of."""
    options = step.model_dump(mode="json")
    return {step.name: options} if options else step.name


AnyStep: TypeAlias = Annotated[Step, PlainValidator(read_step), PlainSerializer(write_step)]
