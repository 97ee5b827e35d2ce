"""Our own engine as anyone uses it: `NativeEngine.from_folder`, all requests at once, nothing guessed ahead."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import material

from engine_peers import side

PRECISIONS = ("fp32", "bf16", "int8")
COMPILED = "compiled"


def python() -> Path:
    return Path(sys.executable)


def model(precision: str) -> Path:
    return material.smollm2() / "base"


def variables() -> dict[str, str]:
    return {}


def compiles() -> bool:
    """Whether there is a compiler here, and an engine that uses it."""
    from fledge.inference.native import NativeEngine
    from fledge.training.compiling import has_compiler

    known = (inspect.signature(NativeEngine).parameters, inspect.signature(NativeEngine.from_folder).parameters)
    return any("compile" in names for names in known) and has_compiler()


def server(precision: str, port: int, name: str) -> list[str]:
    """The command of its server."""
    return [
        sys.executable, "-m", "fledge.cli.main", "serve", str(model(precision)), "--port", str(port), "--name", name,
        "--dtype", "float32" if precision == "fp32" else "bfloat16",
    ]  # fmt: skip


def load(args: argparse.Namespace) -> side.Generate:
    from fledge.inference.engine import Request
    from fledge.inference.native import NativeEngine

    options: dict[str, Any] = {"prefix_cache": False}  # no run may find what the last one read
    if args.precision == "int8":
        options["weights"] = "int8"
    if args.option == COMPILED:
        options["compile"] = True
    dtype = "float32" if args.precision == "fp32" else "bfloat16"
    engine = NativeEngine.from_folder(args.model, dtype=dtype, device=args.device, **options)

    def generate(prompts: list[side.Prompt], lengths: list[int]) -> list[list[int]]:
        requests = [
            Request(prompt_ids=tuple(prompt), max_new_tokens=length, temperature=0.0, stop_ids=(), speculate=False)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        return [list(result.choice.token_ids) for result in engine.generate(requests)]

    return generate


if __name__ == "__main__":
    side.run(load)
