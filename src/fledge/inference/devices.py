"""Where a model is computed, and in which number format, when nobody says."""

from __future__ import annotations

from pathlib import Path

import torch

from fledge.models.load import base_of, is_adapter

LARGE = 100_000_000
"""bytes of weights above which reading them is what a step waits for"""


def device_of(device: str) -> str:
    """The device that "auto" means here; any other as it is."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def dtype_for(folder: Path, dtype: str, device: str) -> str:
    """What "auto" means for the weights in `folder`: bfloat16 where the processor multiplies it natively and the model
    is large enough to gain, else float32. Any other dtype as it is."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if fast_bfloat16(device) and weight_bytes(folder) > LARGE else "float32"


def fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 matrix products run in hardware there."""
    if device != "cpu":
        return True
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def weight_bytes(folder: Path) -> int:
    """The size of a folder's weights; an adapter's are its base's."""
    if is_adapter(folder):
        folder = base_of(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
