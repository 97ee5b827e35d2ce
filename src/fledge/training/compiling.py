"""torch.compile, made cheap: one decoder layer is compiled, and all layers share it.

Compiling a whole model takes as long as its depth; a layer takes the same few seconds at any depth, and what it fuses
(norms, rotary embedding, SwiGLU) is where the time goes. Compiled code is kept below `$FLEDGE_HOME/cache`, so that
the next run on this machine starts at once. Whether to compile follows from the settings alone, never from a clock:
a resumed run computes with the same kernels as an uninterrupted one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fledge.core.events import Emitter
from fledge.core.language import t
from fledge.core.stage import Execution
from fledge.core.store import home

WORTH = 3e13
"""Floating-point operations of a run from which compiling pays: about two minutes on two cores."""


@contextmanager
def compiled(model: Any, execution: Execution, flops: float, events: Emitter, varying: bool = False) -> Iterator[None]:
    """Within the block the layers of `model` are compiled, where a run of `flops` operations is worth it.

    `varying`: batches come in many shapes, and the code has to be good for all of them.
    """
    worth, message = decide(execution, flops)
    if message:
        events.message(message)
    layers = compile_layers(model, home() / "cache", varying) if worth else []
    try:
        yield
    finally:
        forget(layers)


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


def compile_layers(model: Any, cache: Path, varying: bool = False) -> list[nn.Module]:
    """Compile every layer of `model` in place, for fixed shapes or varying ones, keeping the code below `cache`."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    names = set(inner._no_split_modules or ())
    layers = [module for module in inner.modules() if type(module).__name__ in names]
    for layer in layers:
        _compile(layer, varying)
    return layers


def compile_like(module: nn.Module, original: nn.Module) -> None:
    """Compile a copy as the original is (copying a module forgets it)."""
    for name, layer in original.named_modules():
        if getattr(layer, "_compiled_call_impl", None) is not None:
            _compile(module.get_submodule(name), layer._compiled_for_many)


def _compile(layer: Any, varying: bool) -> None:
    layer.compile(dynamic=varying)
    layer._compiled_for_many = varying


def forget(layers: list[nn.Module]) -> None:
    """Undo `compile_layers`: the model is as before, for other shapes and for saving."""
    for layer in layers:
        layer._compiled_call_impl = None
