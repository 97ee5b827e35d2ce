"""Our own engine as anyone uses it: `NativeEngine.from_folder`, all requests at once, nothing guessed ahead."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import material

from engine_peers import side

PRECISIONS = ("fp32", "bf16", "int8")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def python() -> Path:
    return Path(sys.executable)


def model(precision: str) -> Path:
    return material.smollm2() / "base"


def variables() -> dict[str, str]:
    return {}


def server(precision: str, port: int, name: str) -> list[str]:
    """The command of its server."""
    return [
        sys.executable, "-m", "fledge.cli.main", "serve", str(model(precision)), "--port", str(port), "--name", name,
        "--dtype", DTYPES[precision],
    ]  # fmt: skip


def load(args: argparse.Namespace) -> side.Generate:
    from fledge.inference.engine import Request
    from fledge.inference.native import NativeEngine

    # without a prefix cache: no run may find what the last one read
    engine = NativeEngine.from_folder(args.model, dtype=DTYPES[args.precision], device=args.device, prefix_cache=False)

    def generate(prompts: list[side.Prompt], lengths: list[int]) -> list[list[int]]:
        requests = [
            Request(prompt_ids=tuple(prompt), max_new_tokens=length, temperature=0.0, stop_ids=(), speculate=False)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        return [list(result.choice.token_ids) for result in engine.generate(requests)]

    return generate


if __name__ == "__main__":
    side.run(load)
