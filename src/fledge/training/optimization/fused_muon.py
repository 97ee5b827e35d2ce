"""Muon (Jordan, 2024) for matrices that are stored otherwise than as (outputs, inputs).

GPT-2 keeps its matrices transposed, and query, key and value in one. An update is made orthogonal by itself for each of
the three, as the author advises, and its size follows from outputs and inputs as they are, not as they are stored.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
STEPS = 5
EPS = 1e-7


class FusedMuon(torch.optim.Optimizer):
    """Muon for parameters of shape (inputs, parts · outputs); a group says how many `parts` there are."""

    def __init__(self, groups: Iterable[dict[str, Any]], weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; what `closure` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum_buffer"], group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(_like(parameter, _orthogonal_parts(update, group["parts"])), alpha=-group["lr"])
        return loss


def parts_of(model: nn.Module) -> dict[int, int]:
    """How many matrices are in each transposed one, by the parameter's id."""
    library = sys.modules.get("transformers.pytorch_utils")  # no model has any before it is imported
    found: dict[int, int] = {}
    for name, module in model.named_modules():
        if library is not None and isinstance(module, library.Conv1D):
            inputs, outputs = module.weight.shape
            found[id(module.weight)] = outputs // inputs if name.endswith("c_attn") else 1
    return found


def _orthogonal_parts(update: Tensor, parts: int) -> Tensor:
    """Each of the matrices in `update` (inputs, parts · outputs) made orthogonal, and as large as its form asks for."""
    whole = update.full_tensor() if isinstance(update, DTensor) else update
    made = []
    for matrix in whole.T.chunk(parts):  # (outputs, inputs)
        rows, columns = matrix.shape
        made.append(_orthogonal(matrix) * math.sqrt(max(1, rows / columns)))
    return torch.cat(made).T


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: its singular values lie between 0.5 and 1.5."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix.bfloat16() if wide else matrix.bfloat16().T
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def _like(parameter: Tensor, update: Tensor) -> Tensor:
    """The update in the parameter's type, divided among processes as it is."""
    update = update.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(update.contiguous(), parameter.device_mesh, parameter.placements)
    return update
