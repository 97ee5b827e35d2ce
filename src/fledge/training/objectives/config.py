"""The objectives of pre-training as a recipe names them. Imports nothing heavy.

objective: masked
objective: {masked: {rate: 0.2, whole_word: true}}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import Field, PlainSerializer, PlainValidator, ValidationError

from fledge.core.errors import Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.core.stage import Config

DECODER, ENCODER, BOTH = "decoder", "encoder", "encoder-decoder"
PLURAL = {DECODER: "decoders", ENCODER: "encoders", BOTH: "encoder-decoders"}


class PretrainingObjective(Config):
    """What a model from scratch, or one that goes on with its pre-training, is taught by."""

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    """the kind of model that can be taught so: a decoder, an encoder, or both"""
    families: ClassVar[tuple[str, ...]] = ()
    """the families of that kind, where not all will do"""

    def __init_subclass__(cls, name: str = "", kind: str = "", families: tuple[str, ...] = ()) -> None:
        cls.name, cls.kind, cls.families = name, kind, families

    def check(self, kind: str, family: str) -> Iterator[Problem]:
        """Why a model of this kind and family cannot be taught so; `where` is filled in by the recipe."""
        if kind != self.kind or (self.families and family not in self.families):
            fitting = [
                name for name, cls in OBJECTIVES.items() if cls.kind == kind and family in (cls.families or (family,))
            ]
            yield Problem(
                t("this objective does not fit the model: {objective} is for {kinds}", objective=self.name,
                  kinds=listing(self.families) if self.families else t(PLURAL[self.kind])),
                found=f"{self.name}, family: {family}",
                allowed=t("for this family: {objectives}", objectives=listing(fitting)),
            )  # fmt: skip


class Causal(PretrainingObjective, name="causal", kind=DECODER):
    """Every token from those before it."""


class Masked(PretrainingObjective, name="masked", kind=ENCODER):
    """Masked tokens from all others (Devlin et al., 2019), with new masks at every step (Liu et al., 2019)."""

    rate: float = Field(0.15, gt=0, lt=1, description="share of the tokens (or words) that are predicted")
    keep: float = Field(0.1, ge=0, le=1, description="share of those that stay as they are")
    random: float = Field(0.1, ge=0, le=1, description="share of those that become any other token")
    whole_word: bool = Field(False, description="mask whole words: Chinese ones are found by jieba")
    absolute_positions: bool = Field(
        True,
        description="of DeBERTa only: its enhanced mask decoder, which tells absolute positions before the softmax",
    )


class ReplacedToken(PretrainingObjective, name="replaced_token", kind=ENCODER, families=("electra",)):
    """Which tokens a small masked language model has put in (ELECTRA: Clark et al., 2020)."""

    rate: float = Field(0.15, gt=0, lt=1, description="share of the tokens that the generator predicts")
    generator: float = Field(0.25, gt=0, le=1, description="width of the generator as a share of the discriminator's")
    weight: float = Field(50.0, gt=0, description="λ, the weight of the discriminator's loss")


class SpanCorruption(PretrainingObjective, name="span_corruption", kind=BOTH):
    """Spans that were replaced by sentinels (T5: Raffel et al., 2020)."""

    rate: float = Field(0.15, gt=0, lt=1, description="share of the tokens that lie in spans")
    mean: float = Field(3.0, ge=1, description="tokens a span, on average")


class Denoising(PretrainingObjective, name="denoising", kind=BOTH):
    """The text as it was, from a corrupted one (BART: Lewis et al., 2020)."""

    infill: float = Field(0.3, ge=0, lt=1, description="share of the tokens in spans, each of which becomes one mask")
    mean: float = Field(3.0, ge=1, description="λ of the spans' Poisson-distributed lengths")
    permute: bool = Field(True, description="put a document's sentences, English or Chinese, in another order")
    mask: float = Field(0.0, ge=0, lt=1, description="share of single tokens that become the mask")
    delete: float = Field(0.0, ge=0, lt=1, description="share of single tokens that vanish")
    rotate: bool = Field(False, description="let a document begin with any of its tokens")


OBJECTIVES: dict[str, type[PretrainingObjective]] = {
    cls.name: cls for cls in (Causal, Masked, ReplacedToken, SpanCorruption, Denoising)
}


def read_objective(value: object) -> PretrainingObjective:
    """`masked` or `{masked: {rate: 0.2}}`. Raises ValueError that says what is allowed."""
    if isinstance(value, PretrainingObjective):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("must be the name of an objective, or {name: {option: value}}")
    (name, options) = next(iter(value.items()))
    if name not in OBJECTIVES:
        raise ValueError(
            f'there is no objective "{name}" (there are {", ".join(OBJECTIVES)}) '
            f"{did_you_mean(str(name), OBJECTIVES)}".rstrip()
        )
    fields = OBJECTIVES[name].model_fields
    for key in options or {}:
        if key not in fields:
            allowed = ", ".join(fields) or "none"
            raise ValueError(
                f'objective {name} has no option "{key}" (it has {allowed}) {did_you_mean(str(key), fields)}'.rstrip()
            )
    try:
        made = OBJECTIVES[name](**(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"objective {name}, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if isinstance(made, Masked) and made.keep + made.random > 1:
        raise ValueError("objective masked: keep and random are shares of the same tokens, at most 1 together")
    return made


def write_objective(objective: PretrainingObjective) -> Any:
    """The inverse of `read_objective`, all options spelled out: what a fingerprint is made of."""
    options = objective.model_dump(mode="json")
    return {objective.name: options} if options else objective.name


AnyObjective: TypeAlias = Annotated[
    PretrainingObjective, PlainValidator(read_objective), PlainSerializer(write_objective)
]
