"""What the machine itself can do: bytes read a second, and the rates of its matrix products on pre-packed weights.

Run as `python -m engine_peers.limits [--device cuda]`; prints one line of JSON (bytes/s, FLOP/s). The best of many
short tries counts: a limit is what can be had, not what is usual.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

ROWS, WIDTH = 512, 2048


def best(work: Callable[[], Any], device: str, tries: int = 12) -> float:
    """Seconds of the fastest of `tries`, after two to warm up."""
    seconds = []
    for _ in range(tries + 2):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])


def read_rate(device: str) -> float:
    """Bytes a second of a sum over more than any cache holds."""
    numbers = torch.ones(1 << 30 if device == "cuda" else 1 << 27, device=device)
    return numbers.numel() * numbers.element_size() / best(numbers.sum, device)


def linear_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of x (ROWS, WIDTH) times a weight (WIDTH, WIDTH), packed as oneDNN likes it where there is a processor."""
    x, weight = torch.randn(ROWS, WIDTH).to(device, dtype), torch.randn(WIDTH, WIDTH).to(device, dtype)
    if device == "cuda":
        product: Callable[[], Any] = lambda: x @ weight  # noqa: E731
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        product = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # noqa: E731
    return 2 * ROWS * WIDTH * WIDTH / best(product, device)


def int8_rate(device: str) -> float:
    """Operations a second of int8 × int8 → int32."""
    a = torch.randint(-128, 128, (ROWS, WIDTH), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (WIDTH, WIDTH), dtype=torch.int8, device=device)
    return 2 * ROWS * WIDTH * WIDTH / best(lambda: torch._int_mm(a, b), device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    with torch.inference_mode():
        found = {
            "read": read_rate(device),
            "fp32": linear_rate(torch.float32, device),
            "bf16": linear_rate(torch.bfloat16, device),
            "int8": int8_rate(device),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
