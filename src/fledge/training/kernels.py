"""What makes a step fast, put on for a training and taken off after it: on a GPU the fastest attention installed.

On a CPU it is attention in blocks (`models.block_attention`), and freed memory is kept: a step asks for the same
hundreds of megabytes as the one before it, and what was given back in between has to be zeroed by the system, page by
page, a tenth of the time. Of the machine code for products little is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fledge.core.allocator import keep_few_products, keep_freed_memory

FITS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "glm", "glm4", "granite", "smollm3", "olmo2"})
"""Model types of transformers whose attention is causal and nothing else: no bias, no cap, no sinks."""
PARTS = "fledge_context"
"""The attention of models that read parts of rows (`layout.context`): it stays as it is."""


@contextmanager
def fast_kernels(models: Iterable[Any], device: str, dtype: str = "bfloat16") -> Iterator[None]:
    """Within the block the models run on the kernels that suit training on `device` in the arithmetic `dtype`: on a CPU
    those of ours, on a GPU the fastest that is installed (`models.attention`). Their results stay the same to the
    rounding of the arithmetic."""
    from fledge.models import attention, block_attention

    inner = [model.get_base_model() if hasattr(model, "peft_config") else model for model in models]
    inner = [model for model in inner if getattr(getattr(model, "config", None), "_attn_implementation", "") != PARTS]
    if torch.device(device).type == "cpu":
        keep_freed_memory()
        keep_few_products()
        fitting = [m for m in inner if getattr(getattr(m, "config", None), "model_type", "") in FITS]
        chosen = [block_attention.NAME] * len(fitting)
    else:
        fitting = [m for m in inner if hasattr(m, "set_attn_implementation")]
        chosen = [attention.kernel_for(m, attention.device_at(device), getattr(torch, dtype)) for m in fitting]
    before = [model.config._attn_implementation for model in fitting]
    for model, name in zip(fitting, chosen, strict=True):
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        for model, name in zip(fitting, before, strict=True):
            model.set_attn_implementation(name)
