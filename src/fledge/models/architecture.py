"""A model in numbers: what a shape comes to in one family, how many parameters that is, and what a token costs.

Imports nothing heavy: the plan and the estimates read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fledge.models.families import Family


@dataclass(frozen=True)
class Architecture:
    """A model of one family (`models/families.py`). Widths and lengths are in numbers and tokens.

    `layers` are the decoder's, or the encoder's; an encoder-decoder has `decoder_layers` beside them, else 0. `window`
    is how many tokens back a token sees, None for all. `rope_scaling` is what transformers calls `rope_parameters`,
    without the base; `dropout` is by part, and a part that is not named keeps its family's default.
    """

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
    family: str = "llama"
    positions: str = "rope"
    window: int | None = None
    decoder_layers: int = 0
    embedding: int = 0
    """width of the token embedding, where it differs from `hidden` (ELECTRA); 0: the same"""
    rope_scaling: Mapping[str, Any] | None = None
    dropout: Mapping[str, float] = field(default_factory=dict)
    head: str = "lm"
    """what stands on top: lm, or for ELECTRA discriminator and generator"""
    pad_id: int = 1
    """the tokenizer's padding id; RoBERTa's table of positions begins behind it"""

    @property
    def about(self) -> Family:
        """What is true of every model of the family."""
        from fledge.models.families import FAMILIES

        return FAMILIES[self.family]

    @property
    def kind(self) -> str:
        """decoder, encoder or encoder-decoder."""
        return self.about.kind

    @property
    def embedding_width(self) -> int:
        """Numbers a token's embedding has."""
        return self.embedding or self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding and, when it is not tied to it, of the output layer."""
        return self.vocab_size * self.embedding_width * (1 if self.tie_embeddings else 2)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer (of the encoder, where there is a decoder beside it)."""
        return self.about.layer(self)

    @property
    def decoder_layer_parameters(self) -> int:
        """Parameters of one layer of the decoder beside an encoder: one attention and one norm more."""
        return self.about.decoder_layer(self) if self.decoder_layers else 0

    @property
    def other_parameters(self) -> int:
        """What belongs neither to the layers nor to the token embedding: positions, outer norms, the head's inside."""
        return self.about.other(self)

    @property
    def parameters(self) -> int:
        """All parameters, in closed form; equal to what the built model has."""
        layers = self.layers * self.layer_parameters + self.decoder_layers * self.decoder_layer_parameters
        return layers + self.other_parameters + self.embedding_parameters

    @property
    def output_parameters(self) -> int:
        """Weights of the output layer, tied or not: vocabulary · width, none for a discriminator."""
        return 0 if self.head == "discriminator" else self.vocab_size * self.embedding_width

    def training_flops(self, tokens: float, sequence: int) -> float:
        """Floating-point operations to train on `tokens`, in rows of `sequence` tokens.

        6 a token for every weight that multiplies (the output layer counts, the embedding look-up does not), and
        12 · layers · width · sequence for attention (Kaplan et al., 2020; Narayanan et al., 2021), of which a window
        leaves what it sees. An encoder-decoder reads half of the tokens and writes the other half.
        """
        multiplied = self.layers * self.layer_parameters + self.output_parameters
        attended = 12 * self.layers * self.heads * self.head_dim * min(sequence, self.window or sequence)
        if self.decoder_layers:
            multiplied += self.decoder_layers * self.decoder_layer_parameters
            attended += 24 * self.decoder_layers * self.heads * self.head_dim * sequence  # itself, and the encoder
            multiplied, attended = multiplied // 2, attended // 2
        return tokens * (6 * multiplied + attended)

    def generator(self, share: float = 0.25) -> Architecture:
        """ELECTRA's generator for this discriminator: `share` of its width (Clark et al., 2020, section 3.2: between
        1/4 and 1/2), the same depth, and the same token embedding."""
        heads = max(1, round(self.heads * share))
        hidden = heads * self.head_dim
        return replace(
            self,
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            intermediate=max(1, round(self.intermediate * hidden / self.hidden)),
            embedding=self.embedding_width,
            head="generator",
        )
