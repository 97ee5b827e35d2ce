"""The output layer and its cross-entropy, forward and backward: fledge's fused one against the plain one and torch's.

    python benchmarks/loss.py [--quick]

4,096 hidden states of 512 numbers (the pre-training benchmark) and 1,024 of 576 (SmolLM2's), vocabularies of 16,384
and 49,152, bf16 products as under autocast, fp32 weights whose gradient is wanted. The peers: the plain one (all
logits, then `F.cross_entropy` in fp32) and `F.linear_cross_entropy` of torch 2.13 with its chunks. Each side runs in a
process of its own, so that peak memory is its own; ours must agree with the plain one to the rounding of bf16
(torch's gives its loss in bf16).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from peers import conclude, measure

CHUNKED = "torch's chunked"
SHAPES = {"33 M LLaMA": (4096, 512, 16_384), "SmolLM2-135M": (1024, 576, 49_152)}


def sides() -> dict[str, Callable[[Any, Any, Any], Any]]:
    """Mean loss from hidden states (N, D), weight (V, D) and labels (N,)."""
    import torch
    import torch.nn.functional as F

    from fledge.training.kernels import keep_freed_memory
    from fledge.training.likelihood import Head, weighted_nll

    def fledge(hidden: Any, weight: Any, labels: Any) -> Any:
        keep_freed_memory()
        return weighted_nll(hidden, Head(weight), labels)[0] / len(labels)

    def plain(hidden: Any, weight: Any, labels: Any) -> Any:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def chunked(hidden: Any, weight: Any, labels: Any) -> Any:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, options=options)

    found = {"fledge": fledge, "plain": plain}
    return {**found, CHUNKED: chunked} if hasattr(F, "linear_cross_entropy") else found


def one_side(name: str, shape: str, repeats: int) -> None:
    """Print the median seconds of a forward and backward pass, the loss, and the norms of both gradients."""
    import torch

    rows, width, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width)).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,))
    side, seconds = sides()[name], []
    for _ in range(repeats + 1):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = side(hidden, weight, labels)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    norms = [float(hidden.grad.norm()), float(weight.grad.norm())]
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "loss": float(loss.detach()), "norms": norms}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repeats instead of nine")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    repeats = 3 if args.quick else 9
    if args.side:
        return one_side(args.side, args.shape, repeats)
    equal, worst = True, {}
    for shape, (rows, _, _) in SHAPES.items():
        speeds, known = {}, {}
        for name in sides():
            if name == CHUNKED and rows < 4096:
                continue  # a vocabulary of 49,152 takes it minutes
            run = measure([sys.executable, __file__, "--side", name, "--shape", shape, *["--quick"] * args.quick])
            known[name] = json.loads(run.output.splitlines()[-1])
            speeds[name] = rows / known[name]["seconds"]
            print(f"{shape}, {name}: {speeds[name]:,.0f} tokens/s, {run.peak_bytes / 1e9:.2f} GB, "
                  f"loss {known[name]['loss']:.4f}", flush=True)  # fmt: skip
        ours, exact = known["fledge"], known["plain"]
        pairs = zip([ours["loss"], *ours["norms"]], [exact["loss"], *exact["norms"]], strict=True)
        equal &= all(abs(a / b - 1) < 2e-3 for a, b in pairs)
        if not worst or speeds["fledge"] / max(v for k, v in speeds.items() if k != "fledge") < worst["ratio"]:
            mine = speeds.pop("fledge")
            worst = {"ours": mine, "peers": speeds, "ratio": mine / max(speeds.values())}
    conclude("loss", "tokens/s", worst["ours"], worst["peers"], equal)


if __name__ == "__main__":
    main()
