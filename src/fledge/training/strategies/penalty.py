"""Penalties that hold weights near where they began: ½ c Σ F (θ − θ*)², with F = 1 (L2-SP) or Fisher's diagonal (EWC).

The gradient c F (θ − θ*) is known without autograd. The Trainer adds it once a step, after the micro-batches and ranks
have been summed and any loss scale taken out, and before the norm is taken and clipped: a penalty is not multiplied by
micro-batches or ranks, and is clipped with the rest. θ* are the weights at the start, taken before a checkpoint is
restored, so that a resumed run is held to the same place.

A penalty's value is a metric of its own and no part of `loss`, which stays the mean over the data: what is compared
with held-out rows and watched for spikes is the same number with and without it (as it is with weight decay).

Everything is elementwise: of a divided parameter (DTensor) every process penalises the part it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def _all(name: str, parameter: Tensor) -> float:
    return 1.0


class Penalty:
    """½ · coefficient · Σ weight · (θ − θ*)² over the parameters that are trained."""

    name: ClassVar[str] = "penalty"
    """what its value is called among the metrics"""

    def __init__(self, coefficient: float, weights: Mapping[str, Tensor] | None = None) -> None:
        self.coefficient, self.weights = coefficient, weights
        self._held: dict[str, tuple[Tensor, Tensor | None]] = {}  # θ* and its weights, by the parameter's name

    @torch.no_grad()
    def hold(self, parameters: Mapping[str, Tensor]) -> None:
        """Take the parameters as they are for θ*. With weights, one that has none is not penalised."""
        for name, parameter in parameters.items():
            if self.weights is None or name in self.weights:
                weight = None if self.weights is None else _laid_out_like(parameter, self.weights[name])
                self._held[name] = local(parameter).detach().clone(), weight
        self.weights = None

    @torch.no_grad()
    def add(self, parameters: Mapping[str, Tensor], share: Callable[[str, Tensor], float] = _all) -> float:
        """Add the penalty's gradient to those that are there; its value before the step. Frozen ones and ones that are
        not named are passed over.

        `share` says of a parameter which part of the value this process answers for, where several hold the same.
        """
        found = torch.zeros((), dtype=torch.float64)
        for name, (start, weight) in self._held.items():
            parameter = parameters.get(name)
            if parameter is None or not parameter.requires_grad:
                continue
            moved = local(parameter).detach() - start
            pull = moved if weight is None else moved * weight
            found = found.to(pull.device) + share(name, parameter) * (pull * moved).sum()
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            local(parameter.grad).add_(pull, alpha=self.coefficient)
        return 0.5 * self.coefficient * float(found)


class L2SP(Penalty):
    """L2-SP (Li, Grandvalet and Davoine, 2018, eq. 2): ½ α ‖θ − θ*‖². What is new, as a head, is held to its draw."""

    name = "l2_sp"


class ElasticWeights(Penalty):
    """EWC (Kirkpatrick et al., 2017, eq. 3): ½ λ Σ F (θ − θ*)², F the Fisher information's diagonal of the old task."""

    name = "ewc"


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _laid_out_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """The part of a whole tensor that goes with what this process holds of the parameter."""
    like = whole.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return local(distribute_tensor(like, parameter.device_mesh, parameter.placements))
    return like
