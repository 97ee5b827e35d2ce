"""Matrix products of few and many rows: our tiles against oneDNN's packed ones and `F.linear`.

    python benchmarks/tiles.py [--threads 2] [--quick]

SmolLM2-135M's four shapes of a layer, in fp32 and bf16, as many copies as do not fit into the processor's caches. The
sides take turns, the best of several rounds counts. Checked: ours agrees with the float64 product, and a row has the
same bits alone as among all. Printed: microseconds, the rate at which weights are read (one row) or multiplied, and how
many times as fast as the better of the two we are. `ratio` is the smallest of them. `--quick`: two shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from peers import conclude
from torch import Tensor, nn

from fledge.inference import weights
from fledge.inference.kernels import of
from fledge.inference.program import Program
from fledge.inference.weights import PackedLinear

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
ROWS = (1, 8, 40, 64, 512)
BEYOND = 200_000_000
"""bytes of weights that no cache holds"""


def packed(layer: nn.Linear, tiles: bool) -> PackedLinear:
    """The layer in tiles, or as oneDNN packs it."""
    in_tiles = weights.in_tiles
    weights.in_tiles = (lambda weight: True) if tiles else (lambda weight: False)
    try:
        return PackedLinear([layer])
    finally:
        weights.in_tiles = in_tiles


def tiled(programs: list[Program], work: int, number: int, **values: int) -> None:
    """A product as the engine computes it: an instruction that is there already."""
    programs[number].run(work, **values)


def by_module(layers: list[nn.Module], x: Tensor, number: int) -> None:
    layers[number](x)


def fastest(sides: list[Callable[[int], object]], copies: int, rounds: int) -> list[float]:
    """Seconds of a product of each side, in turn."""
    best = [float("inf")] * len(sides)
    for _ in range(rounds):
        for place, side in enumerate(sides):
            began = time.perf_counter()
            for number in range(copies):
                side(number)
            best[place] = min(best[place], (time.perf_counter() - began) / copies)
    return best


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="two shapes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    worst, equal = (float("inf"), 0.0, 0.0, 0.0), True
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in SHAPES[:2] if args.quick else SHAPES:
            copies = max(2, BEYOND // (outputs * inputs * dtype.itemsize))
            layers = [nn.Linear(inputs, outputs, False).to(dtype) for _ in range(copies)]
            ours, theirs = ([packed(layer, tiles) for layer in layers] for tiles in (True, False))
            programs = [Program(dtype) for _ in range(copies)]
            for program, layer in zip(programs, ours, strict=True):
                layer.add_to(program, "x", "out")
            for rows in ROWS:
                x, out = torch.randn(rows, inputs).to(dtype), torch.empty(rows, outputs, dtype=dtype)
                work = 2 * rows * outputs * inputs
                run = partial(tiled, programs, work, rows=rows, x=of(x), out=of(out))
                run(0)
                exact = x.double() @ layers[0].weight.double().T
                tolerance = 1e-5 if dtype == torch.float32 else 1e-2
                equal &= bool((out - exact).abs().max() <= tolerance * exact.abs().max())
                equal &= torch.equal(ours[0](x[-1:]), out[-1:])
                seconds = fastest([run, partial(by_module, theirs, x), partial(by_module, layers, x)], copies,
                                  3 if rows > 64 else 6)  # fmt: skip
                rate = outputs * inputs * dtype.itemsize if rows == 1 else work
                unit = "GB/s" if rows == 1 else "G/s"
                print(f"{str(dtype)[6:]:8} {outputs:4} × {inputs:4} {rows:3} rows: tiles {1e6 * seconds[0]:7.0f} µs"
                      f" ({rate / seconds[0] / 1e9:5.1f} {unit}), oneDNN {1e6 * seconds[1]:7.0f}, F.linear"
                      f" {1e6 * seconds[2]:7.0f}; {min(seconds[1:]) / seconds[0]:.2f} ×", flush=True)  # fmt: skip
                worst = min(worst, (min(seconds[1:]) / seconds[0], *(work / each / 1e9 for each in seconds)))
    conclude("tiles", "G/s", worst[1], {"oneDNN": worst[2], "F.linear": worst[3]}, equal)


if __name__ == "__main__":
    main()
