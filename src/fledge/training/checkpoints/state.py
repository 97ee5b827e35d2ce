"""The tensors of a run by name: what is trained, and what the optimisers remember of it.

    model.layers.0.mlp.up_proj.weight              a parameter
    optimizer.exp_avg.model.layers.0.mlp…          what an optimiser keeps for it

Names do not depend on how the run is divided among processes, so another division finds its parts. Learning rates and
the other options of the groups are not state: they follow from the recipe and the step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PREFIX = "optimizer"


class RunState:
    """The parameters of a run and its optimisers' states, seen as one table of tensors."""

    def __init__(self, parameters: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.parameters, self.optimizers = parameters, optimizers
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters alone: the tensors themselves, no copies."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All of it: the tensors themselves, no copies (but of numbers)."""
        return self.weights() | {name: tensor for parts in self._states().values() for name, tensor in parts.items()}

    def wanted(self, names: Collection[str]) -> dict[str, Tensor]:
        """What to read from a checkpoint that has `names`: all, but for the state of parameters of which it has none
        (they had made no step yet), which is forgotten here too."""
        wanted = self.weights()
        for (optimizer, parameter), parts in self._states().items():
            if any(name in names for name in parts):
                wanted |= parts
            else:
                del self.optimizers[optimizer].state[self.parameters[parameter]]
        return wanted

    def prepare(self) -> None:
        """Have every optimiser make the state of a parameter that has none yet, as a first step without rate does.

        The values are to be overwritten by those of a checkpoint; the parameters may change by a rounding.
        """
        for optimizer in self.optimizers:
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            if all(optimizer.state.get(parameter) for parameter in trained):
                continue
            rates = [group["lr"] for group in optimizer.param_groups]
            held = [parameter.grad for parameter in trained]
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            for parameter, gradient in zip(trained, held, strict=True):
                parameter.grad = gradient
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def take_numbers(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what an optimiser keeps as plain numbers, from tensors that were read."""
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool) and id(parameter) in self._names:
                        state[key] = type(value)(tensors[self._name(key, parameter)].item())

    def _states(self) -> dict[tuple[int, str], dict[str, Tensor]]:
        """What is kept for each parameter, by the optimiser's number and the parameter's name."""
        found: dict[tuple[int, str], dict[str, Tensor]] = {}
        for index, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state.items():
                if id(parameter) not in self._names:
                    continue
                tensors = {self._name(key, parameter): _tensor(value) for key, value in state.items()}
                found[index, self._names[id(parameter)]] = {n: v for n, v in tensors.items() if v is not None}
        return found

    def _name(self, key: str, parameter: Tensor) -> str:
        return f"{PREFIX}.{key}.{self._names[id(parameter)]}"


def _tensor(value: Any) -> Tensor | None:
    """A piece of state as a tensor, a number as one of its own; None for what is neither."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    return None
