"""Dropout by part of a model, in one vocabulary for all families. Imports nothing heavy.

    dropout: {attention: 0.1, hidden: 0.1}

Families call the parts differently, and some have no such part: `attention_dropout`, `attn_pdrop`,
`attention_probs_dropout_prob`. What cannot be mapped is refused, never left out in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.core.stage import Config
from fledge.models.families import FAMILIES


class Dropout(Config):
    """Shares of numbers set to zero while training, by part; a part that is left out keeps the family's default."""

    attention: float | None = Field(None, ge=0, lt=1, description="attention weights")
    hidden: float | None = Field(None, ge=0, lt=1, description="what a layer adds to the residual stream")
    embedding: float | None = Field(None, ge=0, lt=1, description="token and position embeddings, where apart")
    activation: float | None = Field(None, ge=0, lt=1, description="inside the feed-forward layer")
    classifier: float | None = Field(None, ge=0, lt=1, description="before a classification head")
    pooler: float | None = Field(None, ge=0, lt=1, description="before the pooled state of a text (DeBERTa)")

    def parts(self) -> dict[str, float]:
        """The parts that are said."""
        return self.model_dump(exclude_none=True)


KNOWN: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout"),
    "hidden": ("hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout", "dropout_rate", "residual_dropout"),
    "embedding": ("embd_pdrop", "embedding_dropout", "embed_dropout", "emb_pdrop"),
    "activation": ("activation_dropout", "ffn_dropout"),
    "classifier": ("classifier_dropout", "cls_dropout", "classifier_dropout_prob", "summary_last_dropout"),
    "pooler": ("pooler_dropout",),
}
"""What configs call the parts, for checkpoints of families that are not in `families.py`."""

_TYPES = {"gpt2": "gpt2", "deberta-v2": "deberta-v3"}


def keys_for(family: str, parts: Mapping[str, float]) -> dict[str, float]:
    """The config's keys of `parts` in a family of ours. Raises FledgeError for a part that the family has not."""
    return _mapped(FAMILIES[family].dropout, parts, family)


def keys_of_config(config: Any, parts: Mapping[str, float]) -> dict[str, float]:
    """The keys of `parts` in the config of a loaded checkpoint."""
    kind = str(config.model_type)
    family = FAMILIES.get(_TYPES.get(kind, kind))
    known = family.dropout if family else {part: _named(config, names) for part, names in KNOWN.items()}
    return _mapped({part: names for part, names in known.items() if names}, parts, kind)


def _named(config: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if hasattr(config, name))


def _mapped(known: Mapping[str, tuple[str, ...]], parts: Mapping[str, float], family: str) -> dict[str, float]:
    for part in parts:
        if part not in known:
            raise FledgeError(
                Problem(
                    t("{family} models have no dropout there", family=family),
                    where=f"dropout.{part}",
                    found=part,
                    allowed=listing(sorted(known)),
                )
            )
    return {key: value for part, value in parts.items() for key in known[part]}
