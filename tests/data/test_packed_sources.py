"""Packed rows of several sources: every token says where it comes from, over borders of rows and epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fledge.data.tokens.batches import PackedBatches
from fledge.data.tokens.packing import pack
from fledge.data.tokens.rows import Prefetched


def test_every_token_says_where_it_comes_from(tmp_path: Path) -> None:
    """Documents of the first source hold ids below 50, those of the second above; 0 stands before each of both."""
    rng = np.random.default_rng(0)
    first = [list(rng.integers(1, 50, rng.integers(1, 9))) for _ in range(11)]
    second = [list(rng.integers(50, 99, rng.integers(1, 30))) for _ in range(5)]
    shards = pack([*first, *second], tmp_path / "tokens", 0, 100)
    plain, told = (PackedBatches(shards, 16, 3, 7, sources=s) for s in (None, {"short": 11, "long": 5}))
    assert plain.sources == () and told.sources == ("short", "long")
    with Prefetched(told) as ahead:
        assert ahead.sources == ("short", "long")
    seen = set()
    for step in range(2 * len(told) + 1):
        batch, known = told.batch(step), plain.batch(step)
        assert known.source is None and (batch.input_ids == known.input_ids).all()
        assert batch.source is not None and batch.source.shape == batch.input_ids.shape
        words = batch.input_ids > 0
        assert ((batch.input_ids >= 50) == (batch.source == 1))[words].all()
        same = (batch.position_ids[:, 1:] > 0) & ~words[:, :-1]  # a separator and the first word behind it
        assert (batch.source[:, 1:] == batch.source[:, :-1])[same].all()
        seen |= set(batch.source.ravel().tolist())
    assert seen == {0, 1}
    with pytest.raises(ValueError, match="15 documents have a source, of 16"):
        PackedBatches(shards, 16, 3, 7, sources={"short": 10, "long": 5})
