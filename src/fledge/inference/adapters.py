"""LoRA adapters by request: rows of different adapters in one batch over one base (Chen et al., Punica, 2023).

A step reads T tokens of many sequences. The base's product is computed for all of them at once; what the step's
adapters add to it takes two small products, however many adapters there are: their matrices A are stacked, x Aᵀ is
computed for all rows, what a row's own adapter did not compute is made zero, and one product with the matrices B side
by side adds the rest. Rows may lie in any order.

`Adapters` knows whose rows are in the step (`rows`) and adds to the output of every linear that an adapter names: by a
forward hook where the linear stands by itself, by a call of `add_product` where several linears have been fused into
one that the model's own modules no longer see.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.inference.lora import Adapter, LowRank, linears, read_adapter
from fledge.inference.weights import on_onednn

_NAME = re.compile(r"[\w.:/@+-]+")
_SETS = 8
"""sets of adapters whose stacked matrices are kept"""
_ROWS = 2
"""the fewest rows of a product: with one, oneDNN sums in another order"""


class _Product:
    """x ↦ x Wᵀ (+ c), packed once for the processor where oneDNN is."""

    def __init__(self, weights: Tensor, constant: Tensor | None = None) -> None:
        self.packed = on_onednn(weights)
        self.weights = torch.ops.mkldnn._reorder_linear_weight(weights, 16) if self.packed else weights
        self.constant = constant

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) → (N, out)."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weights, self.constant, "none", [], "")
        return F.linear(x, self.weights, self.constant)


@dataclass
class _Stack:
    """What some adapters add to one product: down (in → R), up (R → out), whose each of the R columns is."""

    down: _Product
    up: _Product
    owners: tuple[int, ...]
    """of each column: the place of its adapter in the set"""


@dataclass
class _Set:
    """Adapters that are in a step together, and their stacked matrices by the names of the linears of a product."""

    adapters: tuple[Adapter, ...]
    stacks: dict[tuple[str, ...], _Stack | None] = field(default_factory=dict)


@dataclass
class _Rows:
    """Whose the rows of a batch are: the place of the adapter in the step's set, -1 where there is none."""

    owners: Tensor | None
    """(rows,); None: all rows are the only adapter's"""
    masks: dict[tuple[tuple[int, ...], int], Tensor] = field(default_factory=dict)

    def mask(self, columns: tuple[int, ...], rows: int, like: Tensor) -> Tensor | None:
        """(rows, R): 1 where a column is the row's own. Rows beyond those that are known have none."""
        if self.owners is None:
            return None
        found = self.masks.get((columns, rows))
        if found is None:
            owners = F.pad(self.owners, (0, rows - len(self.owners)), value=-1)
            found = (owners[:, None] == torch.tensor(columns, device=owners.device)).to(like)
            self.masks[columns, rows] = found
        return found


class Adapters:
    """The adapters that an engine knows, and whose rows the step holds that is computed now.

    `own` is an adapter that the model itself consists of (a Trainer's live LoRA): it reads the rows without a name.
    """

    def __init__(self, model: nn.Module, base: Path | None = None, own: Adapter | None = None) -> None:
        """`model`: before its linears are packed or fused. `base`: the folder it came from, where there is one."""
        self.base, self.own = base, own
        self._model = model
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self._like = torch.empty(0, dtype=weight.dtype, device=weight.device)
        self._linears = dict(linears(model))
        self._known: dict[str, Adapter] = {}
        self._made = 0
        self._head = next((name for name, module in model.named_modules() if module is _head(model)), "")
        self._hooks: dict[str, Any] = {}
        self._sets: OrderedDict[tuple[str, ...], _Set] = OrderedDict()
        self._step: _Set | None = None
        self._all = self._picked = _Rows(None)

    def attach(self) -> None:
        """Find the layers that `own` names, once the model has been packed and fused."""
        if self.own is not None:
            self._hook(self.own)

    def __len__(self) -> int:
        return len(self._known)

    @property
    def names(self) -> list[str]:
        """What requests may ask for."""
        return list(self._known)

    @property
    def active(self) -> bool:
        """Whether any row of the step that is computed now has an adapter."""
        return self._step is not None

    def __getitem__(self, name: str) -> Adapter:
        """The adapter of that name. Raises FledgeError when there is none."""
        if name not in self._known:
            raise FledgeError(
                Problem(
                    t('there is no adapter "{name}"', name=name),
                    "adapter",
                    allowed=listing(self.names) or t("none: this engine knows no adapters"),
                    fix=did_you_mean(name, self._known),
                )
            )
        return self._known[name]

    def key(self, name: str) -> str:
        """What distinguishes an adapter's blocks in the prefix cache; "" for the model itself."""
        return self[name].key if name else ""

    def load(self, name: str, folder: Path, tokenizer: Any = None) -> Adapter:
        """Read a PEFT folder without making it known: slow, and safe in any thread. `tokenizer`: the engine's.

        Raises FledgeError for a name that is taken, a folder that is no plain LoRA, an adapter of another base.
        """
        if not _NAME.fullmatch(name) or name in self._known:
            raise FledgeError(
                Problem(
                    t("an adapter needs a name of its own"),
                    "adapter",
                    found=repr(name),
                    allowed=t("letters, digits and . _ - : / @ +, not {names}", names=listing(self.names) or "–"),
                )
            )
        self._made += 1
        return read_adapter(name, f"{name}#{self._made}", folder, self._linears, self.base, self._like, tokenizer)

    def add(self, adapter: Adapter) -> None:
        """Make it known to requests. Between two steps only."""
        self._known[adapter.name] = adapter
        self._sets.clear()
        self._hook(adapter)

    def remove(self, name: str) -> Adapter:
        """Forget it. Between two steps only. Raises FledgeError when there is no such adapter."""
        adapter = self[name]
        del self._known[name]
        self._sets.clear()
        return adapter

    def follow(self, own: Adapter | None) -> None:
        """The weights of `own` have changed. Between two steps only."""
        self.own = own
        self._sets.clear()

    # ---- a step

    @contextmanager
    def rows(self, parts: Sequence[tuple[str, int]], picked: Sequence[int] | None = None) -> Iterator[None]:
        """For the duration of a step: (adapter, rows) of every sequence, in the order of the flat batch.

        Rows behind the last of them (padding to a fixed shape) have no adapter. `picked`: the rows that the output
        layer reads; None: all of them.
        """
        present = {name for name, count in parts if count}
        # In the order in which they became known, so that the order of the parts changes no sum.
        names = [name for name in ("", *self._known) if name in present and (name or self.own is not None)]
        unknown = present - {"", *self._known}
        self._step = self._set(tuple(names) + tuple(unknown)) if names or unknown else None
        if self._step is not None:
            places = {name: place for place, name in enumerate(names)}
            owners = [places.get(name, -1) for name, count in parts for _ in range(count)]
            self._all = self._owned(owners)
            self._picked = self._all if picked is None else self._owned([owners[row] for row in picked])
        try:
            yield
        finally:
            self._step = None

    @contextmanager
    def every_row(self, name: str) -> Iterator[None]:
        """For a batch of any shape that one adapter reads alone."""
        self._step = self._set((name,)) if name or self.own is not None else None
        self._all = self._picked = _Rows(None)
        try:
            yield
        finally:
            self._step = None

    def _owned(self, owners: list[int]) -> _Rows:
        return _Rows(torch.tensor(owners, dtype=torch.long, device=self._like.device) if any(owners) else None)

    def _set(self, names: tuple[str, ...]) -> _Set:
        """These adapters and their stacked matrices, kept while they come again."""
        if names not in self._sets:
            self._sets[names] = _Set(tuple(self[name] if name else self._own for name in names))
            if len(self._sets) > _SETS:
                self._sets.popitem(last=False)
        self._sets.move_to_end(names)
        return self._sets[names]

    @property
    def _own(self) -> Adapter:
        assert self.own is not None
        return self.own

    def add_product(self, out: Tensor, x: Tensor, *modules: str) -> None:
        """Add what the step's adapters add to linear layers of the same inputs x (T, in) that are one product.

        `out` (T, sum of their outputs) is changed in place; the layers' outputs lie in it side by side.
        """
        step = self._step
        if step is None:
            return
        if modules not in step.stacks:
            step.stacks[modules] = self._stacked(step.adapters, modules)
        stack = step.stacks[modules]
        if stack is None:
            return
        rows = len(x)
        if rows < _ROWS:
            x = F.pad(x, (0, 0, 0, _ROWS - rows))
        low = stack.down(x.to(self._like.dtype))  # (T, R)
        owned = self._picked if modules[0] == self._head else self._all
        mask = owned.mask(stack.owners, len(low), low)
        out += stack.up(low if mask is None else low.mul_(mask))[:rows]

    def _stacked(self, adapters: Sequence[Adapter], modules: tuple[str, ...]) -> _Stack | None:
        """The matrices of all these adapters for all these layers; None where no adapter names any of them."""
        found: list[tuple[int, int, LowRank]] = []  # adapter, first output, its update
        for place, adapter in enumerate(adapters):
            first = 0
            for name in modules:
                if (part := adapter.parts.get(name)) is not None:
                    found.append((place, first, part))
                first += self._linears[name].outputs
        if not found:
            return None
        ranks = [len(part.a) + (part.bias is not None) for _, _, part in found]
        down = self._like.new_zeros(sum(ranks), found[0][2].a.shape[1])
        up = self._like.new_zeros(first, sum(ranks))
        constant = self._like.new_zeros(sum(ranks))
        column = 0
        for (_, first, part), rank in zip(found, ranks, strict=True):
            r, outputs = len(part.a), len(part.b)
            down[column : column + r] = part.a.detach()
            up[first : first + outputs, column : column + r] = part.b.detach() * part.scale
            if part.bias is not None:  # a column of ones, for this adapter's rows
                constant[column + r] = 1
                up[first : first + outputs, column + r] = part.bias.detach() * part.scale
            column += rank
        owners = tuple(place for (place, _, _), rank in zip(found, ranks, strict=True) for _ in range(rank))
        return _Stack(_Product(down, constant if constant.any() else None), _Product(up), owners)

    # ---- linears that stand by themselves

    def _hook(self, adapter: Adapter) -> None:
        """Let the layers that the adapter names ask us, where the model still has them as modules."""
        for name in adapter.parts:
            if name not in self._hooks and (module := _submodule(self._model, name)) is not None:
                self._hooks[name] = module.register_forward_hook(partial(self._after, name))

    def _after(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._step is not None:
            x = inputs[0]
            self.add_product(output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1]), name)


def _head(model: Any) -> nn.Module | None:
    """The output layer of a language model."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # fused into another: that one asks by itself
        return None
