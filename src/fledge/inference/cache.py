"""The keys and values of all running answers, a slot each.

Per layer two tensors (slots, kv_heads, length, head_dim). Running answers fill the slots 0 … B-1 without a gap, so
that a decoding step reads a view, never a gathered copy; when one leaves, the last moves into its slot. The tensors
grow with what is needed; the scheduler asks `fits` before it lets them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_LENGTH_STEP = 64


class SlotLayer(CacheLayerMixin):
    """One layer's slots. `update` takes one token of every running answer."""

    is_croppable = False

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, kv_heads, 1, head_dim) at each row's own length; return all that the rows hold."""
        rows, length = self.owner.rows, self.owner.longest + 1
        assert self.keys is not None and self.values is not None
        self.keys[rows, :, self.owner.positions] = key_states[:, :, 0]
        self.values[rows, :, self.owner.positions] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :length], self.values[: len(rows), :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.longest + query_length, 0

    def get_seq_length(self) -> int:
        return self.owner.longest

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The slots of every layer, and how many tokens each slot holds."""

    def __init__(self, budget: int) -> None:
        """`budget`: the most bytes that the tensors should take."""
        self.budget = budget
        self.lengths: list[int] = []  # tokens held, by slot
        self.bytes_per_token = 0  # all layers, keys and values; known after the first `adopt`
        self.rows = self.positions = torch.zeros(0, dtype=torch.long)
        super().__init__(layers=[])

    @property
    def longest(self) -> int:
        """The tokens held by the fullest slot."""
        return max(self.lengths, default=0)

    def fits(self, rows: int, length: int) -> bool:
        """Whether `rows` slots of `length` tokens stay within the budget."""
        if self.layers and self._holds(rows, length):
            return True
        slots, capacity = _capacity(rows, length)
        return slots * capacity * self.bytes_per_token <= self.budget

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` slots of `length` tokens, keeping what the slots hold."""
        if self._holds(rows, length):
            return
        for layer in self.layers:
            layer.keys = _resized(layer.keys, rows, length, len(self.lengths), self.longest)
            layer.values = _resized(layer.values, rows, length, len(self.lengths), self.longest)

    def _holds(self, rows: int, length: int) -> bool:
        return bool(self.layers[0].keys.shape[0] >= rows and self.layers[0].keys.shape[2] >= length)

    def adopt(self, prefilled: Cache, row: int, start: int) -> int:
        """Copy row `row` of a prefilled cache, from its column `start` on, into a new slot; returns the slot."""
        if not self.layers:
            for source in prefilled.layers:
                layer = SlotLayer(self)
                layer.keys, layer.values = source.keys[:0, :, :0], source.values[:0, :, :0]
                self.bytes_per_token += sum(x[0, :, 0].numel() * x.element_size() for x in (source.keys, source.values))
                self.layers.append(layer)
        slot, length = len(self.lengths), prefilled.get_seq_length() - start
        self.reserve(slot + 1, max(length, self.longest) + 1)
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.keys[slot, :, :length] = source.keys[row, :, start:]
            layer.values[slot, :, :length] = source.values[row, :, start:]
        self.lengths.append(length)
        return slot

    def begin_step(self) -> tuple[Tensor, Tensor]:
        """Prepare one token for every slot: its positions (B, 1) and the mask (B, 1, 1, longest + 1), True = seen."""
        self.reserve(len(self.lengths), self.longest + 1)
        device = self.layers[0].keys.device
        self.positions = torch.tensor(self.lengths, device=device)
        self.rows = torch.arange(len(self.lengths), device=device)
        columns = torch.arange(self.longest + 1, device=device)
        return self.positions[:, None], (columns <= self.positions[:, None])[:, None, None, :]

    def end_step(self) -> None:
        """Every slot holds one token more."""
        self.lengths = [length + 1 for length in self.lengths]

    def release(self, slot: int) -> None:
        """Empty a slot; the last slot moves into it."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                # Cleared, not left: a masked NaN would still poison whoever comes next (0 · NaN = NaN).
                tensor[slot].zero_()
                if slot != last:
                    tensor[slot, :, :length] = tensor[last, :, :length]
        self.lengths[slot] = length
        self.lengths.pop()


def _capacity(rows: int, length: int) -> tuple[int, int]:
    """What is allocated for a need: rows to the next power of two, length by quarters ahead."""
    ahead = length + max(length // 4, 1)
    return 1 << (rows - 1).bit_length(), -(-ahead // _LENGTH_STEP) * _LENGTH_STEP


def _resized(old: Tensor, rows: int, length: int, used_rows: int, used_length: int) -> Tensor:
    slots, capacity = _capacity(rows, length)
    new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
    new[:used_rows, :, :used_length] = old[:used_rows, :, :used_length]
    return new
