"""Which attention kernel a model is trained with on a GPU: the fastest that is installed, that the model's class takes,
and on which documents of a packed row stay apart.

| kernel | from compute capability | arithmetic | attention dropout |
|---|---|---|---|
| FlashAttention-3 (Shah et al., 2024) | 9.0 (Hopper) | 16 bits | none |
| FlashAttention-2 (Dao, 2023) | 8.0 (Ampere) | 16 bits | yes |
| FlexAttention (Dong et al., 2024) | 8.0, with Triton | any | none |
| SDPA | any | any | yes |
| eager | any | any | yes |

On CPUs it is SDPA, or the kernel of ours that `training.kernels` puts on while training.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

TESTED = frozenset({"llama", "mistral", "qwen2", "qwen3", "glm", "gpt2"})
"""Model types whose packed documents are known to stay apart on every kernel; others take SDPA and a mask."""


@dataclass(frozen=True)
class Kernel:
    """One row of the table: what it needs of the card, the arithmetic and the model's class."""

    name: str
    flag: str = ""
    """the class attribute of transformers that says whether a model takes it"""
    capability: tuple[int, int] = (0, 0)
    sixteen_bits: bool = False
    dropout: bool = True
    tested_only: bool = False


KERNELS = (
    Kernel("flash_attention_3", "_supports_flash_attn", (9, 0), sixteen_bits=True, dropout=False, tested_only=True),
    Kernel("flash_attention_2", "_supports_flash_attn", (8, 0), sixteen_bits=True, tested_only=True),
    Kernel("flex_attention", "_supports_flex_attn", (8, 0), dropout=False, tested_only=True),
    Kernel("sdpa", "_supports_sdpa"),
    Kernel("eager"),
)
"""In the order of preference."""


@dataclass(frozen=True)
class Device:
    """What a device has: its kind, its compute capability, and which kernels are installed for it."""

    kind: str = "cpu"
    capability: tuple[int, int] = (0, 0)
    installed: frozenset[str] = frozenset({"sdpa", "eager"})


@cache
def device_at(name: str) -> Device:
    """What there is at a torch device (`cpu`, `cuda:0`)."""
    device = torch.device(name)
    if device.type != "cuda":
        return Device(device.type)
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_flex_attn_available

    triton = importlib.util.find_spec("triton") is not None
    there = {
        "flash_attention_3": is_flash_attn_3_available(),
        "flash_attention_2": is_flash_attn_2_available(),
        "flex_attention": is_torch_flex_attn_available() and triton,
    }
    found = {kernel for kernel, yes in there.items() if yes} | {"sdpa", "eager"}
    return Device("cuda", torch.cuda.get_device_capability(device), frozenset(found))


def kernel_for(model: Any, device: Device, dtype: torch.dtype) -> str:
    """The kernel, by its name in transformers, with which `model` is trained on `device` in the arithmetic `dtype`."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    drops = attention_dropout(inner.config) > 0
    for kernel in KERNELS:
        if (
            kernel.name in device.installed
            and (not kernel.flag or getattr(inner, kernel.flag, False))
            and device.capability >= kernel.capability
            and (device.kind == "cuda" or not kernel.tested_only)
            and (dtype in (torch.bfloat16, torch.float16) or not kernel.sixteen_bits)
            and (kernel.dropout or not drops)
            and (inner.config.model_type in TESTED or not kernel.tested_only)
        ):
            return kernel.name
    return "eager"


def attention_dropout(config: Any) -> float:
    """The dropout of attention weights that a config asks for."""
    from fledge.models.dropout import KNOWN

    return max(float(getattr(config, name, None) or 0) for name in KNOWN["attention"])
