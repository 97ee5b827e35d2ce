"""Randomness without a state: numbers that depend on seeds alone, and on no library's version (splitmix64)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fledge.data.ngrams import mix
from fledge.data.tokens.batches import Batch, Ids

Uniforms = NDArray[np.float64]
_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniforms(shape: int | tuple[int, ...], *seeds: int) -> Uniforms:
    """Numbers in [0, 1), 53 bits each, that depend on their place and on the seeds alone."""
    state = np.zeros(1, dtype=np.uint64)
    for seed in seeds:
        state = mix(state + np.array([seed & (2**64 - 1)], dtype=np.uint64) + _STEP)
    places = np.arange(int(np.prod(shape)), dtype=np.uint64)
    bits = mix(mix(places * _STEP + state) + _STEP) >> np.uint64(11)
    return (bits.astype(np.float64) * 2.0**-53).reshape(shape)


def chosen(places: int, count: int, keys: Uniforms) -> NDArray[np.bool_]:
    """(B, places) true at `count` places of each row, every set of places as likely as any; keys (B, places)."""
    taken = np.zeros((len(keys), places), dtype=np.bool_)
    if count:
        np.put_along_axis(taken, np.argsort(keys, axis=1, kind="stable")[:, :count], True, axis=1)
    return taken


class RowSource(Protocol):
    """A source of whole rows: `batches.PackedBatches`, `rows.RowBatches`, or a mixture of such."""

    def __len__(self) -> int: ...

    def batch(self, step: int) -> Any: ...


class Corrupted:
    """A source whose batches are another source's, corrupted anew at every step: `corrupt(batch, step)`.

    The step is among the seeds, so a row that comes again in a later epoch is corrupted otherwise (dynamic masking,
    Liu et al., 2019), and a resumed run sees what it would have seen. What a batch holds beside its rows is kept.
    """

    def __init__(self, source: RowSource, corrupt: Callable[[Batch, int], Mapping[str, Any]]) -> None:
        self.source, self.corrupt = source, corrupt

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, step: int) -> dict[str, Any]:
        """The corrupted batch of the step."""
        found = self.source.batch(step)
        arrays = dict(found) if isinstance(found, Mapping) else vars(found)
        rows: dict[str, Any] = {field.name: arrays.get(field.name) for field in fields(Batch)}
        beside = {name: value for name, value in arrays.items() if name not in rows}
        return {**beside, **self.corrupt(Batch(**rows), step)}


def documents_of(position_ids: Ids) -> Ids:
    """(B, T) the number of the document, in its row, that each token belongs to, from 1; positions restart at 0."""
    return np.asarray((position_ids == 0).cumsum(axis=1))
