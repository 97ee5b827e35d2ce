"""torch.compile, made cheap: one decoder layer is compiled, and all layers share it.

Compiling a whole model takes as long as its depth; a layer takes the same few seconds at any depth, and what it fuses
(norms, rotary embedding, SwiGLU) is where the time goes. Compiled code is kept below `$FLEDGE_HOME/cache`, so that
the next run on this machine starts at once. Whether to compile follows from the settings alone, never from a clock:
a resumed run computes with the same kernels as an uninterrupted one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from fledge.core.language import t
from fledge.core.stage import Execution

WORTH = 3e13
"""Floating-point operations of a run from which compiling pays: about two minutes on two cores."""


def decide(execution: Execution, flops: float) -> tuple[bool, str]:
    """Whether to compile a run of `flops` operations, and what to tell the user where that may surprise."""
    if execution.compile == "off" or (execution.compile == "auto" and flops < WORTH):
        return False, ""
    if not has_compiler():
        return False, t("no C++ compiler (g++) was found: nothing is compiled, and training takes longer")
    return True, t("compiling the layers, which takes up to a minute the first time")


def has_compiler() -> bool:
    """Whether inductor can build for this processor."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def compile_layers(model: Any, cache: Path) -> list[nn.Module]:
    """Compile every decoder layer of `model` in place, for fixed shapes, keeping the code below `cache`."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    names = set(inner._no_split_modules or ())
    layers = [module for module in inner.modules() if type(module).__name__ in names]
    for layer in layers:
        layer.compile(dynamic=False)
    return layers


def forget(layers: list[nn.Module]) -> None:
    """Undo `compile_layers`: the model is as before, for other shapes and for saving."""
    for layer in layers:
        layer._compiled_call_impl = None
