"""The order of a curriculum: texts of one source and language ranked by a score, and cut into buckets of equal size.

Scores of two languages or two kinds of text do not compare (perplexities least of all), so each is ranked among its
own kind. The mixture is then the same from the first bucket to the last, and within each kind the score rises or
falls (Bengio et al., 2009).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def buckets_of(
    scores: NDArray[np.float64],
    sizes: NDArray[np.int64],
    groups: NDArray[np.int64],
    ties: NDArray[np.uint64],
    count: int,
    falling: bool,
) -> NDArray[np.int64]:
    """(n,) the bucket, 0 … count - 1, of every text: those of one group in `count` parts of equal size, in the order of
    their scores; equal scores are ordered by `ties`."""
    order = np.lexsort((ties, -scores if falling else scores, groups))
    _, first, members = np.unique(groups[order], return_index=True, return_counts=True)
    behind = np.cumsum(sizes[order])
    before = behind - sizes[order]  # size of what stands before each text
    total = np.repeat(behind[first + members - 1] - before[first], members)
    middle = before - np.repeat(before[first], members) + sizes[order] / 2
    buckets = np.empty(len(scores), dtype=np.int64)
    buckets[order] = np.minimum(count - 1, (middle * count / np.maximum(total, 1)).astype(np.int64))
    return buckets
