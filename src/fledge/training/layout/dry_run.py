"""What each of many processes would hold under a layout, without any of them: torch's fake process group.

The mesh is made for all processes, the layout is applied to a model on the meta device exactly as in a run, and what
is left on a process is counted. Nothing is allocated and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fledge.core.errors import FledgeError
from fledge.core.stage import Layout
from fledge.models.architecture import Architecture
from fledge.models.build import make_config, model_class
from fledge.training.layout.check import Facts, check_layout
from fledge.training.layout.ranks import DIMENSIONS, Ranks, mesh_of
from fledge.training.layout.spread import Spread

FULL = 4  # bytes of a weight in fp32; gradients have the same format


@dataclass(frozen=True)
class Holding:
    """What one process holds between steps, in numbers and bytes."""

    rank: int
    places: dict[str, int]
    """its place along every dimension of the layout"""
    parameters: int
    weights: int
    gradients: int
    """summed over the micro-batches of a step"""
    optimizer: int
    """AdamW's two moments in fp32"""
    whole: int
    """weights that are put together to compute with, at one time"""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.whole


def per_rank(layout: Layout, shape: Architecture, processes: int, ranks: list[int] | None = None) -> list[Holding]:
    """What processes hold of a model of `shape` (default: the first and the last of every stage of the pipeline,
    which hold most and least).

    Raises FledgeError where the layout does not fit the model. No process group may be there.
    """
    if problems := list(check_layout(Facts.of_shape(shape), layout, processes)):
        raise FledgeError(*problems)
    resolved = layout.resolve(processes)
    if ranks is None:
        each = processes // resolved.pipeline
        ranks = sorted({place * each + end for place in range(resolved.pipeline) for end in (0, each - 1)})
    return [_holding(resolved, shape, processes, rank) for rank in ranks]


def _holding(layout: Layout, shape: Architecture, processes: int, rank: int) -> Holding:
    model = _on_meta(shape)
    with _fake_group(rank, processes):
        plain = layout.replicate == processes
        ours = Ranks(rank, processes, layout, None if plain else mesh_of(layout, "cpu"))
        spread = Spread({"model": model}, ("model",), ours, "cpu")
        held = list(spread.parameters().values())
        parameters = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in held)
        divided = ours.sharded > 1
        undivided = sum(_without_shard(p) for p in held)
        layers = layout.zero == 3 and divided
        return Holding(
            rank,
            {name: ours.at(name) for name in DIMENSIONS},
            parameters,
            FULL * parameters,
            FULL * (undivided if divided and layout.zero == 1 else parameters),
            2 * FULL * parameters,
            FULL * (_largest(spread) if layers else undivided) if divided else 0,
        )


def _on_meta(shape: Architecture) -> Any:
    config = make_config(shape)
    with torch.device("meta"):
        return model_class(shape, config, "lm")(config)


def _without_shard(parameter: Any) -> int:
    """Numbers that a process computes with: its part, put together along `shard` and `context`."""
    if not isinstance(parameter, DTensor):
        return int(parameter.numel())
    here = parameter.to_local().numel()
    for name, place in zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True):
        if name == "shard" and place.is_shard():
            here *= parameter.device_mesh[name].size()
    return int(min(here, parameter.numel()))


def _largest(spread: Spread) -> int:
    """Numbers that are whole at one time under ZeRO-3: what is outside the layers, a layer, and the one after it."""
    layers: dict[str, int] = {}
    outside = 0
    for name, parameter in spread.parameters().items():
        number = next((part for part in name.split(".") if part.isdigit()), None)
        if number is None:
            outside += _without_shard(parameter)
        else:
            layers[number] = layers.get(number, 0) + _without_shard(parameter)
    return outside + sum(sorted(layers.values())[-2:])


@contextmanager
def _fake_group(rank: int, world: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
