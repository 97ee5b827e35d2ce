"""The number formats that an engine's `dtype` names."""

from __future__ import annotations

from typing import Literal, get_args

Weights = Literal["", "int8", "int4", "fp8"]
"""How linear layers are kept and multiplied (`weights.py`); "": in the model's own number format."""
FORMATS: tuple[str, ...] = get_args(Weights)[1:]
DTYPES = ("auto", "float32", "bfloat16", *FORMATS)
