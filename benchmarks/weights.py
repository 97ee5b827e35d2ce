"""Linear layers in each number format: what they cost to read and to multiply, and what they take from a model.

    python benchmarks/weights.py [--threads 2] [--quick]

Products of 1, 8 and 64 rows, the best of many repetitions over matrices that together do not fit into the processor's
caches; then (not `--quick`) SmolLM2-135M on 2,048 tokens of Python's own English reference (`pydoc_data.topics`):
nats a token, through the engine. Its weights came from a file that keeps 4 bits for 32 neighbours, so int4 finds them
on its own grid; `int4, other groups` shifts the groups by 16, which is what weights from training have to bear.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pydoc_data.topics import topics
from typing import Any

import material
import torch
from torch import nn

from fledge.core.allocator import keep_freed_memory
from fledge.inference.formats import Weights
from fledge.inference.int4 import GROUP, Int4
from fledge.inference.native import NativeEngine
from fledge.inference.weights import PackedLinear, pack
from fledge.models.load import load_model, load_tokenizer
from fledge.records.chat import ChatRenderer

FORMATS: list[tuple[str, torch.dtype, Weights]] = [
    ("fp32", torch.float32, ""), ("bf16", torch.bfloat16, ""), ("int8", torch.bfloat16, "int8"),
    ("int4", torch.bfloat16, "int4"),
]  # fmt: skip
SHAPES = ((4096, 4096), (3072, 576))
ROWS = (1, 8, 64)
TOPICS = ("objects", "specialnames", "execmodel", "strings", "types")


def size(layer: PackedLinear) -> int:
    """Bytes of everything a layer keeps."""
    kept = [*vars(layer).values(), *vars(getattr(layer, "matrix", layer)).values()]
    return sum({id(each): each.nbytes for each in kept if isinstance(each, torch.Tensor)}.values())


@torch.inference_mode()
def products(outputs: int, inputs: int, seconds: float) -> None:
    for name, dtype, weights in FORMATS:
        copies = max(2, 150_000_000 // (outputs * inputs * 2))
        layers = [pack([nn.Linear(inputs, outputs, False).to(dtype)], weights) for _ in range(copies)]
        bits = 8 * size(layers[0]) / (outputs * inputs)
        print(f"{outputs} × {inputs} {name:5} {bits:5.2f} bits a weight", end="")
        for rows in ROWS:
            x = torch.randn(rows, inputs).to(dtype)
            best, end = float("inf"), time.perf_counter() + seconds
            for layer in itertools.cycle(layers):
                began = time.perf_counter()
                layer(x)
                best = min(best, time.perf_counter() - began)
                if time.perf_counter() > end:
                    break
            print(f"  {rows:2} rows {1e6 * best:7.0f} µs", end="")
        print(flush=True)


def shifted(model: Any) -> Any:
    """The model with its layers' weights in 4 bits, in groups that begin 16 later."""
    with torch.no_grad():
        for layer in model.model.layers.modules():
            if isinstance(layer, nn.Linear):
                scales = layer.weight.abs().amax(1, keepdim=True) / 127
                rows = (layer.weight / scales).roll(GROUP // 2, 1)
                layer.weight.copy_((Int4.nearest(rows).unpacked() * scales).roll(-GROUP // 2, 1))
    return model


def losses() -> None:
    folder = material.smollm2() / "base"
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("\n".join(topics[name] for name in TOPICS))[:2048]
    texts = [ids[n : n + 512] for n in range(0, len(ids), 512)]

    def say(name: str, model: Any, weights: Weights) -> None:
        with NativeEngine(model, tokenizer, ChatRenderer(tokenizer), weights=weights) as engine:
            scored = engine.score([text[:1] for text in texts], [text[1:] for text in texts])
        loss = -sum(sum(each.logprobs) for each in scored) / sum(len(each.logprobs) for each in scored)
        print(f"{name:18} {loss:.4f} nats a token", flush=True)

    for name, dtype, weights in FORMATS:
        say(name, load_model(folder, dtype=dtype), weights)
    say("int4, other groups", shifted(load_model(folder)).to(torch.bfloat16), "int8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="products alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    for outputs, inputs in SHAPES:
        products(outputs, inputs, 0.3 if args.quick else 1.0)
    if not args.quick:
        losses()
