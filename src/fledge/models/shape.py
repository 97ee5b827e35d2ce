"""The shape of a model: what a recipe says in the field's words, and what it comes to.

    model: {size: 2M, attention: gqa}                            # a decoder; hidden and layers follow from the size
    model: {hidden: 192, layers: 4, heads: 6, kv_heads: 2}       # said outright
    model: {size: 30M, attention: sliding, window: 512}          # the class that has a window: Mistral
    model: {size: 110M, family: bert, dropout: {hidden: 0.1}}    # a family by its name

The family is named, or it is chosen from the kind of model, its attention and its positions. Imports nothing heavy:
the plan and `fledge --help` read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from fledge.core.errors import FledgeError
from fledge.core.language import t
from fledge.core.stage import Config
from fledge.core.units import Count
from fledge.models.architecture import Architecture as Architecture
from fledge.models.dropout import Dropout, keys_for
from fledge.models.families import BOTH, CHOICE, DECODER, FAMILIES, SLIDING, kinds_of, takes
from fledge.models.rope import RopeScaling

FamilyName = Literal[
    "llama", "mistral", "qwen2", "qwen3", "glm", "baichuan", "gpt2", "gpt_bigcode", "bloom", "xglm",
    "bert", "roberta", "electra", "deberta-v2", "deberta-v3", "t5", "bart",
]  # fmt: skip
MISTRAL_WINDOW = 4096  # of Mistral-7B v0.1


class ModelShape(Config):
    """What to build from scratch: either `size`, or `hidden` and `layers`; the rest follows unless it is said."""

    size: Count | None = Field(None, gt=0, description="about how many parameters, embeddings included, as in 2M")
    family: FamilyName | None = Field(
        None, description="whose block it is (default: chosen from architecture, attention and positions)"
    )
    architecture: Literal["decoder", "encoder", "encoder-decoder"] | None = Field(
        None, description="kind of model, where no family is named (default: decoder)"
    )
    hidden: int | None = Field(None, gt=0, description="width of the residual stream")
    layers: int | None = Field(
        None, gt=0, description="number of layers (of the encoder, where there is a decoder too)"
    )
    decoder_layers: int | None = Field(
        None, gt=0, description="layers of the decoder beside an encoder (default: as many as the encoder's)"
    )
    heads: int | None = Field(None, gt=0, description="attention heads (default: hidden / head_dim)")
    kv_heads: int | None = Field(None, gt=0, description="key and value heads (default: what `attention` says)")
    head_dim: int | None = Field(None, gt=0, description="width of a head (default: 32 below 512 hidden, else 64)")
    intermediate: int | None = Field(
        None, gt=0, description="width of the feed-forward layer (default: 8/3 · hidden where it is gated, else 4 ·)"
    )
    embedding: int | None = Field(None, gt=0, description="width of electra's token embedding (default: hidden)")
    attention: Literal["mha", "gqa", "mqa", "sliding"] | None = Field(
        None,
        description="key and value heads: one a head (mha), one for three or so heads (gqa), one in all (mqa); "
        "sliding: gqa within a window (default: gqa where the family has it)",
    )
    window: Count | None = Field(None, gt=0, description="tokens that a token sees before and with itself")
    positions: Literal["rope", "learned", "sinusoidal", "alibi", "relative"] | None = Field(
        None,
        description="how positions are told apart: rotary embeddings, a learned table, sinusoids, a bias that falls "
        "with the distance, T5's and DeBERTa's relative positions (default: the family's; rope in a decoder)",
    )
    rope_theta: float = Field(10_000.0, gt=0, description="base wavelength of the rotary embeddings")
    rope_scaling: RopeScaling | None = Field(None, description="rotary positions stretched from the start")
    context: Count | None = Field(None, gt=0, description="longest text in tokens (default: the training length)")
    tie_embeddings: bool | None = Field(
        None, description="share the weights of the embedding and the output layer (default: the family's, mostly yes)"
    )
    dropout: Dropout = Field(default_factory=Dropout, description="by part (default: the family's)")

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        explicit = self.hidden is not None or self.layers is not None
        if explicit == (self.size is not None):
            raise ValueError("give either size (as in 2M) or hidden and layers")
        if explicit and (self.hidden is None or self.layers is None):
            raise ValueError("hidden and layers go together")
        self._check_family()
        wrong = _wrong(self.resolve(vocab_size=256))
        if wrong:
            raise ValueError(wrong)
        return self

    @property
    def family_name(self) -> str:
        """The family that is built, named or chosen. Baichuan-13B is the ALiBi decoder that transformers has: BLOOM's,
        with its layer norms and biases where Baichuan's own code has neither."""
        if self.family == "baichuan" and self.positions == "alibi":
            return "bloom"
        if self.family:
            return self.family
        wanted = (self.attention, self.positions, bool(self.window) or self.attention == SLIDING)
        fitting = [name for name in CHOICE[self.architecture or DECODER] if takes(FAMILIES[name], *wanted)]
        return fitting[0] if fitting else ""

    @property
    def kind(self) -> str:
        """decoder, encoder or encoder-decoder."""
        return FAMILIES[self.family_name].kind

    def resolve(self, vocab_size: int, context: int = 2048, pad_id: int = 1) -> Architecture:
        """The numbers, for a vocabulary of `vocab_size` tokens; `context` is used where the shape names none, and
        `pad_id`, the tokenizer's, for RoBERTa, whose positions are counted from it."""
        common = (vocab_size, self.context or context, pad_id)
        if self.size is None:
            return self._at(self.hidden or 0, self.layers or 0, *common)
        candidates = [self._at(hidden, _depth(hidden), *common) for hidden in _widths()]
        return _nearest([shape for shape in candidates if not _wrong(shape)] or candidates, self.size)

    def parameters(self, vocab_size: int) -> int:
        """How many parameters the model will have."""
        return self.resolve(vocab_size).parameters

    def _check_family(self) -> None:
        window = bool(self.window) or self.attention == SLIDING
        if self.family and self.architecture not in (None, self.kind):
            raise ValueError(t("{family} is another kind of model: {kind}", family=self.family, kind=self.kind))
        if not self.family_name or not takes(FAMILIES[self.family_name], self.attention, self.positions, window):
            said = [self.attention, self.positions, "window" if self.window else None]
            allowed = "; ".join(kinds_of(self.architecture or DECODER))
            if self.family:
                family = FAMILIES[self.family_name]
                ways = [*family.attention, *([SLIDING] if family.window else [])]
                allowed = f"{'/'.join(ways)} + {'/'.join(family.positions)}"
            raise ValueError(
                t(
                    "no class of transformers has this: {name} with {said}; there is: {allowed}",
                    name=self.family or self.architecture or DECODER,
                    said=" + ".join(word for word in said if word),
                    allowed=allowed,
                )
            )
        family = FAMILIES[self.family_name]
        if self.attention == SLIDING and self.window is None:
            raise ValueError(t("sliding attention needs its window, in tokens (as in window: 512)"))
        if self.tie_embeddings is not None and self.tie_embeddings not in family.tied:
            raise ValueError(t("{family} always shares the embedding with the output layer", family=self.family_name))
        if self.rope_scaling and "rope" not in family.positions:
            raise ValueError(t("{family} has no rotary positions to stretch", family=self.family_name))
        if self.decoder_layers and family.kind != BOTH:
            raise ValueError(t("{family} has no decoder beside an encoder", family=self.family_name))
        if self.embedding and self.family_name != "electra":
            raise ValueError(t("only electra has an embedding of another width"))
        try:
            keys_for(self.family_name, self.dropout.parts())
        except FledgeError as error:
            raise ValueError(str(error)) from None

    def _at(self, hidden: int, layers: int, vocab_size: int, context: int, pad_id: int) -> Architecture:
        name = self.family_name
        family = FAMILIES[name]
        head_dim = self.head_dim or (hidden // self.heads if self.heads else min(hidden, 32 if hidden < 512 else 64))
        heads = self.heads or max(1, hidden // head_dim)
        attention = "gqa" if self.attention == SLIDING else self.attention or family.attention[0]
        kv_heads = self.kv_heads or {"mha": heads, "gqa": _grouped(heads), "mqa": 1}[attention]
        window = self.window or (MISTRAL_WINDOW if name == "mistral" and self.attention is None else None)
        scaling = self.rope_scaling
        original = (scaling.original or round(context / scaling.factor)) if scaling else 0
        return Architecture(
            vocab_size=vocab_size,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=self.intermediate or (64 * math.ceil(hidden * 8 / 3 / 64) if family.gated else 4 * hidden),
            context=context,
            rope_theta=scaling.base(self.rope_theta, head_dim // (2 if name == "glm" else 1))
            if scaling
            else self.rope_theta,
            tie_embeddings=family.tied[0] if self.tie_embeddings is None else self.tie_embeddings,
            family=name,
            positions=family.positions[0],
            window=window,
            decoder_layers=(self.decoder_layers or layers) if family.kind == BOTH else 0,
            embedding=0 if self.embedding in (None, hidden) else self.embedding or 0,
            rope_scaling=scaling.parameters(original) if scaling else None,
            dropout=self.dropout.parts(),
            head="discriminator" if name == "electra" else "lm",
            pad_id=pad_id,
        )


def _wrong(shape: Architecture) -> str:
    """Why these numbers make no model of their family; nothing where they do."""
    family = FAMILIES[shape.family]
    if "rope" in family.positions and shape.head_dim % 2:
        return t("rotary positions need an even head_dim, not {n}", n=shape.head_dim)
    if shape.family == "glm" and shape.head_dim % 4:
        return t("glm rotates half of a head: head_dim must be a multiple of 4, not {n}", n=shape.head_dim)
    if shape.heads % shape.kv_heads:
        return t("heads ({heads}) must be a multiple of kv_heads ({kv})", heads=shape.heads, kv=shape.kv_heads)
    if not family.free_heads and shape.heads * shape.head_dim != shape.hidden:
        return t(
            "{family} needs hidden = heads · head_dim, not {hidden} and {heads} · {width}",
            family=shape.family,
            hidden=shape.hidden,
            heads=shape.heads,
            width=shape.head_dim,
        )
    ways = {"mha": shape.heads, "mqa": 1}
    if "gqa" not in family.attention and shape.kv_heads not in {ways[name] for name in family.attention}:
        return t("{family} has no grouped key heads", family=shape.family)
    if shape.family == "bloom" and shape.intermediate != 4 * shape.hidden:
        return t("bloom's feed-forward layer is 4 · hidden wide")
    return ""


def _widths() -> Iterator[int]:
    yield 32
    yield from range(64, 16_384 + 1, 64)


def _depth(hidden: int) -> int:
    """Layers that suit a width: 4 at 192, 10 at 768, 31 at 4096 (the aspect ratio grows with the cube root)."""
    return max(2, round(hidden / (48 * (hidden / 192) ** (1 / 3))))


def _nearest(candidates: list[Architecture], size: int) -> Architecture:
    """The candidate whose parameter count is nearest to `size`, as a ratio."""
    return min(candidates, key=lambda shape: abs(math.log(shape.parameters / size)))


def _grouped(heads: int) -> int:
    """Key and value heads of grouped-query attention (Ainslie et al., 2023): the largest divisor up to heads / 3."""
    return max(n for n in range(1, max(1, heads // 3) + 1) if heads % n == 0)
