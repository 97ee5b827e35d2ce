"""The processes of one training run: who we are, and sums over all of us."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fledge.core.stage import Execution


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them. With one process every sum is what went in."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, rank: int, world: int, device: str = "cpu") -> Ranks:
        """Meet the other processes (`torchrun` has set where); nothing happens when there are none."""
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", rank=rank, world_size=world)
        return cls(rank, world)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Which of a batch's rows are ours: contiguous, as equal as can be."""
        return slice(rows * self.rank // self.world, rows * (self.rank + 1) // self.world)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over all processes (one message for all of them)."""
        held = list(tensors)
        if self.world == 1 or not held:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in held])
        dist.all_reduce(flat)
        for tensor, part in zip(held, flat.split([t.numel() for t in held]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.world > 1:
            dist.barrier()


def device_of(execution: Execution) -> str:
    """Where to compute: what the user says, or the graphics card if there is one. Each process takes its own card."""
    if execution.device != "auto":
        return execution.device
    return "cuda" if torch.cuda.is_available() else "cpu"
