"""A Trainer's live weights: text from a model while it is trained, without a second copy of it on disk.

The engine must not touch what the Trainer holds: it packs and fuses linears, registers an attention of its own and
reads in evaluation mode. So it gets a second tree of modules over the *same* parameters (`second_tree`). What an
optimizer writes is seen there at once; what the engine has packed (a copy in another layout) is packed again by
`Live.refresh` between two steps of training, and the prefix cache, which the old weights wrote, is emptied. What that
costs is measured.

A live LoRA model (PEFT) is taken apart into its base, which is frozen and packed once, and the update, whose matrices
are read where the Trainer keeps them (`adapters.Adapters.own`).
"""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.lora import Adapter, LowRank


@dataclass(frozen=True)
class Refreshed:
    """What it took to follow the weights: the sum over all refreshes."""

    times: int = 0
    seconds: float = 0.0
    bytes: int = 0
    """of packed copies that were written anew"""

    def __add__(self, other: Refreshed) -> Refreshed:
        return Refreshed(self.times + other.times, self.seconds + other.seconds, self.bytes + other.bytes)


class Live:
    """A model that is being trained, and the engine's tree of modules over its weights (`tree`, `own`)."""

    def __init__(self, model: nn.Module) -> None:
        """Raises FledgeError for a model of which this process has only a part."""
        self.model = unwrapped(model)
        if any(type(parameter).__name__ == "DTensor" for parameter in self.model.parameters()):
            raise FledgeError(
                Problem(
                    t("this process has only a part of the model's weights"),
                    fix=t("gather them, or follow a model that is whole in every process"),
                )
            )
        tree = second_tree(self.model)
        self._pairs = list(zip(self.model.modules(), tree.modules(), strict=True))
        self.tree, self._lora = apart(tree)
        self.own: Adapter | None = None
        self.spent = Refreshed()
        self._seen: dict[int, tuple[int, int]] = {}
        self._tie()
        self._remember()

    @property
    def stale(self) -> bool:
        """Whether a weight was written since the last refresh (as far as torch counts: not through `.data`)."""
        return self._seen != self._versions()

    def refresh(self) -> Refreshed:
        """Follow the weights as they are now. Between two steps of the engine only."""
        began = time.perf_counter()
        self._tie()
        written = sum(self._repack(module) for module in self.tree.modules())
        self._remember()
        spent = Refreshed(1, time.perf_counter() - began, written)
        self.spent += spent
        return spent

    def _tie(self) -> None:
        """Parameters that were replaced instead of written (`load_state_dict(assign=True)`) are taken over."""
        for theirs, ours in self._pairs:
            for name, parameter in theirs._parameters.items():
                if ours._parameters.get(name) is not None:  # what was packed has let go of its parameters
                    ours._parameters[name] = parameter
        if self._lora:
            self.own = Adapter("", {name: low_rank(layer) for name, layer in self._lora.items()})

    def _repack(self, module: Any) -> int:
        """Let a module that keeps a copy of weights in another layout write it anew; the bytes of these weights.

        Frozen weights that torch saw no change of are left as they are: those under a LoRA are packed once.
        """
        if not callable(getattr(module, "repack", None)):
            return 0
        weights = [parameter for source in getattr(module, "_sources", ()) for parameter in source.parameters()]
        if not any(p.requires_grad or self._seen.get(id(p)) != (p.data_ptr(), p._version) for p in weights):
            return 0
        module.repack()
        return sum(parameter.nbytes for parameter in weights)

    def _versions(self) -> dict[int, tuple[int, int]]:
        return {id(p): (p.data_ptr(), p._version) for p in self.model.parameters()}

    def _remember(self) -> None:
        self._seen = self._versions()


def unwrapped(model: Any) -> nn.Module:
    """The model inside torch's wrappers for several processes and for compiled code."""
    for inside in ("_orig_mod", "module"):
        inner = getattr(model, inside, None)
        if isinstance(inner, nn.Module) and type(model).__module__.startswith("torch."):
            return unwrapped(inner)
    found: nn.Module = model
    return found


def second_tree(model: nn.Module) -> Any:
    """A copy of a model's modules and config over the same parameters and buffers, in evaluation mode."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared).eval()


def apart(model: Any) -> tuple[Any, dict[str, Any]]:
    """A PEFT model as its base and the LoRA layers on it, by the name of the linear they stand on.

    The tree that is given is changed. Whatever is no plain LoRA (DoRA, several adapters at once, one that is merged or
    switched off, another method) stays as it is, and so does a model without PEFT: then there are no layers.
    """
    if not hasattr(model, "peft_config"):
        return model, {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    if not layers or not all(_is_plain(layer) for layer in layers.values()):
        return model, {}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, layer.get_base_layer())
    return base, layers


def _is_plain(layer: Any) -> bool:
    from peft.tuners import lora

    return (
        isinstance(layer, lora.LoraLayer)
        and len(layer.active_adapters) == 1
        and layer.active_adapters[0] in layer.lora_A
        and not getattr(layer, "lora_variant", None)
        and not layer.merged
        and not layer.disable_adapters
    )


def low_rank(layer: Any) -> LowRank:
    """The update of a PEFT layer, over its own matrices."""
    name = layer.active_adapters[0]
    b = layer.lora_B[name]
    return LowRank(_of(layer.lora_A[name]), _of(b), float(layer.scaling[name]), b.bias)


def _of(linear: Any) -> Tensor:
    weight: Tensor = linear.weight.detach()
    return weight
