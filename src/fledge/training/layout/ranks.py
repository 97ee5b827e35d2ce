"""The processes of one training run: who we are, what we hold, and sums over those that hold the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fledge.core.errors import FledgeError
from fledge.core.stage import Execution, Layout
from fledge.training.layout.check import check_device

DIMENSIONS = ("pipeline", "replicate", "shard", "context", "tensor")
"""From the slowest links to the fastest: neighbours in rank divide matrices."""
BUCKET = 2**24
"""Numbers of gradients that travel in one message: 64 MB in fp32."""
ALONE = Layout(replicate=1)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them. With one process every sum is what went in."""

    rank: int = 0
    world: int = 1
    layout: Layout = ALONE
    """with every number said"""
    mesh: DeviceMesh | None = None
    """None where there are only whole copies"""

    @classmethod
    def join(cls, rank: int, world: int, device: str = "cpu", layout: Layout | None = None) -> Ranks:
        """Meet the other processes (`torchrun` has set where); nothing happens when there are none.

        Raises FledgeError for a layout that does not make up `world` processes, or that is not for this device.
        """
        resolved = (layout or Layout()).resolve(world)
        kind = torch.device(device).type
        if resolved.context > 1 and (problems := list(check_device(resolved, kind))):
            raise FledgeError(*problems)
        if world > 1 and not dist.is_initialized():
            if kind == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count()))))
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=world)
        if resolved.replicate == world:
            return cls(rank, world, resolved)
        return cls(rank, world, resolved, mesh_of(resolved, kind))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    @property
    def copies(self) -> int:
        """How many shares the rows of a batch are divided into: copies of the model, sharded ones included."""
        return self.layout.replicate * self.layout.shard

    @property
    def sharded(self) -> int:
        """How many processes divide a copy's state: those that divide its rows among them, and those that divide the
        tokens of a row."""
        return self.layout.shard * self.layout.context

    @property
    def copy(self) -> int:
        """Which of the shares is ours."""
        return self.at("replicate") * self.layout.shard + self.at("shard")

    def at(self, dimension: str) -> int:
        """Our place along a dimension of the layout."""
        if self.mesh is None:
            return self.rank if dimension == "replicate" else 0
        return int(self.mesh.get_local_rank(dimension))

    def group(self, dimension: str) -> Any:
        """The process group along a dimension (None: everybody)."""
        return None if self.mesh is None else self.mesh.get_group(dimension)

    def share(self, rows: int) -> slice:
        """Which of a batch's rows are ours: contiguous, as equal as can be."""
        return slice(rows * self.copy // self.copies, rows * (self.copy + 1) // self.copies)

    def sum(self, tensors: Iterable[Tensor], dimension: str | None = None) -> None:
        """Replace every tensor by its sum over all processes, or those along `dimension`; few messages for many."""
        held = list(tensors)
        others = self.world if dimension is None else getattr(self.layout, dimension)
        if others == 1 or not held:
            return
        group = None if dimension is None else self.group(dimension)
        for bucket in _buckets(held):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=group)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, mine: bool) -> bool:
        """Whether it is so for one of the processes at least: what all of them do has to be decided together."""
        if self.world == 1:
            return mine
        told = torch.tensor([float(mine)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told.item())

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.world > 1:
            dist.barrier()


def mesh_of(layout: Layout, kind: str) -> DeviceMesh:
    """The mesh of a layout whose numbers are all said, on devices of one kind."""
    sizes = tuple(getattr(layout, name) for name in DIMENSIONS)
    return init_device_mesh(kind, sizes, mesh_dim_names=DIMENSIONS)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in runs of one format and at most `BUCKET` numbers (or one tensor)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    yield bucket


def device_of(execution: Execution) -> str:
    """Where to compute: what the user says, or the graphics card if there is one. Each process takes its own card."""
    if execution.device != "auto":
        return execution.device
    return "cuda" if torch.cuda.is_available() else "cpu"
