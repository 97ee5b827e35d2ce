"""Rows over a graph of `graph.py`: a cache of numpy arrays, padded on the left, for whoever computes the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.inference.engines.graph import Shape
from fledge.inference.engines.local import Floats, Rows

Feeds = Mapping[str, NDArray[Any]]
Compute = Callable[[Sequence[str], Feeds], list[NDArray[Any]]]
"""(names of outputs, inputs) → the outputs; any thread may call it"""

_HIDDEN = np.float32(-1e30)
"""added to the score of what is not seen: finite, so that a row of padding has a mean and no NaN"""


class GraphRows(Rows):
    """Keys and values (B, H, P, D) of all layers; row b's `lengths[b]` tokens stand at the right end."""

    def __init__(self, shape: Shape, compute: Compute) -> None:
        self.context, self.vocabulary = shape.context, shape.vocabulary
        self._shape, self._compute = shape, compute
        self._past = [self._empty(0) for _ in range(2 * shape.layers)]
        self._lengths: list[int] = []
        self._present = [f"present.{n}" for n in range(2 * shape.layers)]

    def start(self, prompts: Sequence[Sequence[int]]) -> Floats:
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        ids = np.array([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        past = [self._empty(len(prompts))] * len(self._past)
        logits, present = self._run(ids, lengths, past, [width - 1])
        self._lengths += lengths
        width = max(self._lengths)
        if not self._past[0].shape[0]:
            self._past = present
        else:
            self._past = [
                np.concatenate([_widened(a, width), _widened(b, width)])
                for a, b in zip(self._past, present, strict=True)
            ]
        return logits[:, 0]

    def step(self, tokens: Sequence[int]) -> Floats:
        self._lengths = [length + 1 for length in self._lengths]
        logits, self._past = self._run(np.array(tokens)[:, None], self._lengths, self._past, [0])
        return logits[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        self._lengths = [self._lengths[row] for row in rows]
        width = max(self._lengths, default=0)
        places = np.array(rows, np.intp)
        self._past = [past[places, :, past.shape[2] - width :] for past in self._past]

    def logits(self, ids: Sequence[int], first: int) -> Floats:
        feeds = self._feeds(np.array([ids]), [len(ids)], self._one(), range(first, len(ids)))
        return self._compute(["logits"], feeds)[0][0]

    def hidden(self, ids: Sequence[int]) -> Floats:
        feeds = self._feeds(np.array([ids]), [len(ids)], self._one(), [len(ids) - 1])
        return self._compute(["hidden"], feeds)[0][0]

    def _run(
        self, ids: NDArray[Any], lengths: Sequence[int], past: Sequence[Floats], columns: Sequence[int]
    ) -> tuple[Floats, list[Floats]]:
        logits, *present = self._compute(["logits", *self._present], self._feeds(ids, lengths, past, columns))
        return logits, present

    def _feeds(
        self, ids: NDArray[Any], lengths: Sequence[int], past: Sequence[Floats], columns: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """`ids` (B, T) are the last tokens of rows that hold `lengths` tokens with them."""
        read, whole = ids.shape[1], past[0].shape[2] + ids.shape[1]
        places = np.arange(whole) - whole + np.array(lengths)[:, None]  # (B, P + T), below 0: padding
        asking = places[:, -read:]
        seen = (places[:, None, :] >= 0) & (places[:, None, :] <= asking[:, :, None])
        feeds = {
            "input_ids": ids.astype(np.int64),
            "position_ids": np.maximum(asking, 0).astype(np.int64),
            "mask": np.where(seen, np.float32(0), _HIDDEN)[:, None],
            "columns": np.array(columns, np.int64),
        }
        return feeds | {f"past.{n}": tensor for n, tensor in enumerate(past)}

    def _one(self) -> list[Floats]:
        return [self._empty(1)] * len(self._past)

    def _empty(self, rows: int) -> Floats:
        return np.zeros((rows, self._shape.heads, 0, self._shape.head_size), np.float32)


def _widened(past: Floats, width: int) -> Floats:
    """With zeros on the left (B, H, P, D), or without what is too much there."""
    more = width - past.shape[2]
    return np.pad(past, ((0, 0), (0, 0), (max(more, 0), 0), (0, 0)))[:, :, max(-more, 0) :]
