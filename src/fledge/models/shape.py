"""The shape of a decoder-only model: what a recipe says, what it comes to, and how many parameters that is.

    model: {size: 2M, attention: gqa}                       # hidden and layers follow from the size
    model: {hidden: 192, layers: 4, heads: 6, kv_heads: 2}  # said outright

Imports nothing heavy: the plan and `fledge --help` read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from fledge.core.stage import Config
from fledge.core.units import Count


@dataclass(frozen=True)
class Architecture:
    """A LLaMA decoder in numbers: pre-RMSNorm, rotary positions, SwiGLU, no biases (Touvron et al., 2023)."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int
    rope_theta: float
    tie_embeddings: bool

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding and, when it is not tied to it, of the output layer."""
        return self.vocab_size * self.hidden * (1 if self.tie_embeddings else 2)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: W_Q and W_O, W_K and W_V, the three SwiGLU matrices, two norms."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, in closed form; equal to what the built model has."""
        return self.layers * self.layer_parameters + self.hidden + self.embedding_parameters

    def training_flops(self, tokens: float, sequence: int) -> float:
        """Floating-point operations to train on `tokens`, in rows of `sequence` tokens.

        6 a token for every weight that multiplies (the output layer counts, the embedding look-up does not), and
        12 · layers · width · sequence for attention (Kaplan et al., 2020; Narayanan et al., 2021).
        """
        multiplied = self.layers * self.layer_parameters + self.vocab_size * self.hidden
        return tokens * (6 * multiplied + 12 * self.layers * self.heads * self.head_dim * sequence)


class ModelShape(Config):
    """What to build from scratch: either `size`, or `hidden` and `layers`; the rest follows unless it is said."""

    size: Count | None = Field(None, gt=0, description="about how many parameters, embeddings included, as in 2M")
    hidden: int | None = Field(None, gt=0, description="width of the residual stream")
    layers: int | None = Field(None, gt=0, description="number of decoder layers")
    heads: int | None = Field(None, gt=0, description="attention heads (default: hidden / head_dim)")
    kv_heads: int | None = Field(None, gt=0, description="key and value heads (default: what `attention` says)")
    head_dim: int | None = Field(None, gt=0, description="width of a head (default: 32 below 512 hidden, else 64)")
    intermediate: int | None = Field(None, gt=0, description="width of the feed-forward layer (default: 8/3 · hidden)")
    attention: Literal["mha", "gqa", "mqa"] = Field(
        "gqa", description="key and value heads: one a head (mha), one for three or so heads (gqa), one in all (mqa)"
    )
    positions: Literal["rope"] = Field("rope", description="how positions are told apart: rotary embeddings")
    rope_theta: float = Field(10_000.0, gt=0, description="base wavelength of the rotary embeddings")
    context: Count | None = Field(None, gt=0, description="longest text in tokens (default: the training length)")
    tie_embeddings: bool = Field(True, description="share the weights of the embedding and the output layer")

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        explicit = self.hidden is not None or self.layers is not None
        if explicit == (self.size is not None):
            raise ValueError("give either size (as in 2M) or hidden and layers")
        if explicit and (self.hidden is None or self.layers is None):
            raise ValueError("hidden and layers go together")
        if explicit:
            shape = self.resolve(vocab_size=256)
            if shape.head_dim % 2:
                raise ValueError(f"rotary positions need an even head_dim, not {shape.head_dim}")
            if shape.heads % shape.kv_heads:
                raise ValueError(f"heads ({shape.heads}) must be a multiple of kv_heads ({shape.kv_heads})")
        return self

    def resolve(self, vocab_size: int, context: int = 2048) -> Architecture:
        """The numbers, for a vocabulary of `vocab_size` tokens; `context` is used where the shape names none."""
        if self.size is None:
            return self._at(self.hidden or 0, self.layers or 0, vocab_size, context)
        candidates = (self._at(hidden, _depth(hidden), vocab_size, context) for hidden in _widths())
        return _nearest(candidates, self.size)

    def parameters(self, vocab_size: int) -> int:
        """How many parameters the model will have."""
        return self.resolve(vocab_size).parameters

    def _at(self, hidden: int, layers: int, vocab_size: int, context: int) -> Architecture:
        head_dim = self.head_dim or (hidden // self.heads if self.heads else min(hidden, 32 if hidden < 512 else 64))
        heads = self.heads or max(1, hidden // head_dim)
        kv_heads = self.kv_heads or {"mha": heads, "gqa": _grouped(heads), "mqa": 1}[self.attention]
        return Architecture(
            vocab_size=vocab_size,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=self.intermediate or 64 * math.ceil(hidden * 8 / 3 / 64),
            context=self.context or context,
            rope_theta=self.rope_theta,
            tie_embeddings=self.tie_embeddings,
        )


def _widths() -> Iterator[int]:
    yield 32
    yield from range(64, 16_384 + 1, 64)


def _depth(hidden: int) -> int:
    """Layers that suit a width: 4 at 192, 10 at 768, 31 at 4096 (the aspect ratio grows with the cube root)."""
    return max(2, round(hidden / (48 * (hidden / 192) ** (1 / 3))))


def _nearest(candidates: Iterator[Architecture], size: int) -> Architecture:
    """The candidate whose parameter count is nearest to `size`, as a ratio."""
    return min(candidates, key=lambda shape: abs(math.log(shape.parameters / size)))


def _grouped(heads: int) -> int:
    """Key and value heads of grouped-query attention (Ainslie et al., 2023): the largest divisor up to heads / 3."""
    return max(n for n in range(1, max(1, heads // 3) + 1) if heads % n == 0)
