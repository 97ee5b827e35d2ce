"""All techniques by name: what stands under a key `technique`, and what may stand over what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from fledge.core.draft import rule_of
from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.inference.prompting.base import Technique
from fledge.inference.prompting.consistency import SelfConsistency
from fledge.inference.prompting.framing import Direct, FewShot, Format, Role, Template
from fledge.inference.prompting.react import ReAct
from fledge.inference.prompting.reasoning import ChainOfThought, LeastToMost, PlanAndSolve
from fledge.inference.prompting.reflexion import Reflexion
from fledge.inference.prompting.retrieving import Retrieval, SelectedShots
from fledge.inference.prompting.skeleton import SkeletonOfThought
from fledge.inference.prompting.tree import TreeOfThoughts

_Any = (
    Direct | Role | Template | Format | FewShot | ChainOfThought | SelfConsistency | TreeOfThoughts | ReAct | Reflexion
    | PlanAndSolve | LeastToMost | SkeletonOfThought | Retrieval | SelectedShots
)  # fmt: skip
TECHNIQUES: Mapping[str, type[Technique]] = {kind.model_fields["use"].default: kind for kind in get_args(_Any)}
"""Every technique's class by its name."""


def _named(value: object) -> object:
    """`cot` instead of `{use: cot}`; a name that is not known is said to be so, with the nearest."""
    value = {"use": value} if isinstance(value, str) else value
    if isinstance(value, dict):
        use = value.get("use")
        if not isinstance(use, str) or use not in TECHNIQUES:
            near = did_you_mean(str(use), TECHNIQUES)
            unknown = t('there is no technique "{name}"', name=str(use))
            text = unknown if use else t("a technique is named by its key `use`")
            raise ValueError("; ".join(part for part in (text, near, ", ".join(TECHNIQUES)) if part))
    return value


AnyTechnique: TypeAlias = Annotated[Annotated[_Any, Field(discriminator="use")], BeforeValidator(_named)]
"""Any of the techniques, by its key `use` or by its name alone."""

for _kind in TECHNIQUES.values():
    _kind.model_rebuild(_types_namespace={"AnyTechnique": AnyTechnique})
_READER: TypeAdapter[Technique] = TypeAdapter(AnyTechnique)


def technique(given: str | Mapping[str, Any] | Technique) -> Technique:
    """A technique from its name or its settings: `technique("cot")`, `technique({"use": "react", "steps": 4})`.

    Raises FledgeError for what it does not know or allow.
    """
    if isinstance(given, Technique):
        return given
    try:
        return _READER.validate_python(dict(given) if isinstance(given, Mapping) else given)
    except ValidationError as error:
        raise FledgeError(*map(_problem, error.errors())) from None


def _problem(item: Any) -> Problem:
    """What pydantic found, in our words; the names of the union's members are no keys."""
    loc = [str(part) for part in item["loc"]]
    where = ".".join(["technique", *(part for part in loc if part not in TECHNIQUES)])
    if item["type"] == "extra_forbidden":
        owners = [TECHNIQUES[part] for part in loc if part in TECHNIQUES] or [Technique]
        keys = list(owners[-1].model_fields)
        return Problem(t('"{key}" is unknown', key=loc[-1]), where, "", listing(keys), did_you_mean(loc[-1], keys))
    message = str(item["ctx"]["error"]) if "error" in item.get("ctx", {}) else rule_of(item)
    found = "" if item["type"] in ("missing", "value_error") else repr(item["input"])[:80]
    return Problem(message, where, found, str(item.get("ctx", {}).get("expected", "")))
