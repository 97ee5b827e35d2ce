"""Replay: rows of earlier corpora among those of the new one, in an exact share of every stretch of the run.

Of the first n rows of a run ⌊n · share⌋ are old ones, for every n that ends a batch; the corpora they come from take
turns. Which rows a batch holds follows from its step alone: the i-th row taken from a corpus is row i of its own
endless run of epochs, whatever was asked before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fledge.data.tokens.batches import IGNORED, BatchSource, ConversationBatches, Row, joined, padded
from fledge.records.chat import Rendered
from fledge.training.strategies.settings import Replay

SOURCE = "source"
"""The key of a batch that says where rows (B,) or tokens (B, T) come from: numbers of the source's `sources`."""

Stack: TypeAlias = Callable[[Sequence[Any], Sequence[int]], dict[str, NDArray[Any]]]


class Replayed:
    """A batch source that mixes `new` with `old` ones. All of them give one row a batch: batch i is their row i.

    `sources` are what they are called in the curves, the new one's first. `stack` makes a batch of rows and of the
    numbers of the sources that they come from; by default batches of one row are padded and stacked.
    """

    def __init__(
        self,
        new: BatchSource[Any],
        old: Sequence[BatchSource[Any]],
        share: float,
        batch_size: int,
        sources: Sequence[str],
        stack: Stack | int = 0,
    ) -> None:
        if not old or not 0 < share < 1 or len(sources) != len(old) + 1:
            raise ValueError("replay needs earlier rows, a share between 0 and 1, and a name for every source")
        self.new, self.old, self.share = new, list(old), Fraction(str(share))
        self.batch_size, self.sources = batch_size, tuple(sources)
        self.stack: Stack = padding(stack) if isinstance(stack, int) else stack
        self.dropped = int(getattr(new, "dropped", 0))

    def __len__(self) -> int:
        """Steps after which every row of the new corpus was seen."""
        return math.ceil(len(self.new) / (self.batch_size * (1 - self.share)))

    def old_before(self, step: int) -> int:
        """How many old rows the steps before `step` hold."""
        return math.floor(step * self.batch_size * self.share)

    def batch(self, step: int) -> dict[str, NDArray[Any]]:
        """The rows of a step as the sources give them, and where they come from (`source`)."""
        first, last = self.old_before(step), self.old_before(step + 1)
        start, stop = step * self.batch_size - first, (step + 1) * self.batch_size - last
        turns = [divmod(i, len(self.old)) for i in range(first, last)]
        rows = [self.new.batch(i) for i in range(start, stop)] + [self.old[k].batch(row) for row, k in turns]
        return self.stack(rows, [0] * (stop - start) + [1 + k for _, k in turns])


def replayed(
    new: BatchSource[Any],
    old: Sequence[BatchSource[Any]],
    replay: Replay,
    batch_size: int,
    stack: Stack | int = 0,
) -> Replayed:
    """The source that a recipe's `replay` block asks for; in the curves its corpora are called as in the recipe.

    `stack` is the padding's id, or says how rows become a batch.
    """
    names = "new", *(ref.text.rstrip("/").rpartition("/")[2] for ref in replay.data)
    return Replayed(new, old, replay.share, batch_size, names, stack)


class OneByOne:
    """The rendered rows of a source of conversations whose batches are one row: `batch(i)` is its i-th row."""

    def __init__(self, source: ConversationBatches) -> None:
        self.source, self.dropped = source, source.dropped

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, step: int) -> Row:
        (row,) = self.source.rows_at(step)
        return row


def padding(pad_id: int) -> Stack:
    """Batches of one row stacked and padded on the right; `source` (B,) is a number for every row."""

    def stack(rows: Sequence[Any], origins: Sequence[int]) -> dict[str, NDArray[Any]]:
        return {**stacked([_arrays(row) for row in rows], pad_id), SOURCE: np.array(origins, dtype=np.int64)}

    return stack


def side_by_side(max_length: int, pad_id: int) -> Stack:
    """Rendered rows padded to the longest; `source` (B,) is a number for every row."""

    def stack(rows: Sequence[Any], origins: Sequence[int]) -> dict[str, NDArray[Any]]:
        return {**_arrays(padded(rows, max_length, pad_id)), SOURCE: np.array(origins, dtype=np.int64)}

    return stack


def laid_end_to_end(max_length: int, pad_id: int, row_tokens: int) -> Stack:
    """Rendered rows laid end to end (`data.tokens.batches.joined`); `source` (B, T) is a number for every token."""

    def stack(rows: Sequence[Any], origins: Sequence[int]) -> dict[str, NDArray[Any]]:
        batch = joined(rows, max_length, pad_id, row_tokens)
        numbered = [Rendered([origin] * len(row.ids), row.weights) for row, origin in zip(rows, origins, strict=True)]
        # rows are laid by their lengths alone, so those of equal lengths come to lie in the same places
        return {**_arrays(batch), SOURCE: joined(numbered, max_length, 0, row_tokens).input_ids}

    return stack


def stacked(rows: Sequence[Mapping[str, NDArray[Any]]], pad_id: int) -> dict[str, NDArray[Any]]:
    """Batches of one row as one batch, padded on the right to the longest.

    Where a row is padded its mask is 0, nothing is to be learned, and positions count on.
    """
    longest = max(row["input_ids"].shape[1] for row in rows)
    fill = {"input_ids": pad_id, "labels": IGNORED}
    joined = {}
    for name in rows[0]:
        parts = []
        for row in rows:
            missing = longest - row[name].shape[1] if row[name].ndim > 1 else 0
            part = (
                np.pad(row[name], ((0, 0), (0, missing)), constant_values=fill.get(name, 0)) if missing else row[name]
            )
            if missing and name == "position_ids":
                part[:, -missing:] = part[:, [-missing - 1]] + np.arange(1, missing + 1)
            parts.append(part)
        joined[name] = np.concatenate(parts)
    return joined


def _arrays(batch: Any) -> dict[str, NDArray[Any]]:
    """A source's batch, a mapping or a dataclass of arrays."""
    found = batch if isinstance(batch, Mapping) else vars(batch)
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
