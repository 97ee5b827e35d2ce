"""Rotary positions stretched to a longer context, as a recipe says it. Imports nothing heavy.

RoPE turns the i-th pair of a head's numbers by position · θ^(−2i/d). Positions that training has not seen turn the slow
pairs by angles that it has not seen either, and attention breaks down; scaling brings those angles back into range.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fledge.core.language import t
from fledge.core.stage import Config
from fledge.core.units import Count

Method = Literal["linear", "ntk", "dynamic", "yarn", "llama3"]


class RopeScaling(Config):
    """How rotary positions reach beyond the length that they were trained on."""

    method: Method = Field(
        "yarn",
        description="linear: positions interpolated (Chen et al., 2023); ntk: a larger base (bloc97, 2023); dynamic: "
        "the same, growing with the text; yarn: slow pairs interpolated, fast ones kept, attention sharpened (Peng et "
        "al., 2023); llama3: three bands (Llama 3.1, 2024)",
    )
    factor: float = Field(4.0, gt=1, description="how many times longer the context becomes")
    original: Count | None = Field(None, gt=0, description="context the model was trained on (default: known from it)")
    beta_fast: float = Field(32.0, gt=0, description="yarn: turns within the context from which nothing is stretched")
    beta_slow: float = Field(1.0, gt=0, description="yarn: turns within the context below which all is stretched")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: beta_slow in its own words")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: beta_fast in its own words")

    @model_validator(mode="after")
    def _bands_in_order(self) -> Self:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(t("beta_slow must be below beta_fast"))
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(t("low_freq_factor must be below high_freq_factor"))
        return self

    def base(self, theta: float, rotated: int) -> float:
        """The base wavelength for heads of which `rotated` numbers turn: θ · factor^(d / (d − 2)) with ntk, so that the
        slowest pair is stretched by the factor and the fastest not at all."""
        return float(theta * self.factor ** (rotated / (rotated - 2))) if self.method == "ntk" else theta

    def parameters(self, original: int) -> dict[str, Any]:
        """transformers' `rope_parameters` without the base, for a model trained on `original` tokens."""
        if self.method == "ntk":
            return {"rope_type": "default"}
        found: dict[str, Any] = {"rope_type": self.method, "factor": self.factor}
        if self.method == "yarn":
            found |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        if self.method == "llama3":
            found |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.method in ("yarn", "llama3"):
            found["original_max_position_embeddings"] = original
        return found

    def written(self, original: int) -> int:
        """What `max_position_embeddings` says: the new context; dynamic scaling counts from the old one."""
        return original if self.method == "dynamic" else round(original * self.factor)
