"""Dense search: texts as vectors of length 1, the nearest by exact inner product (that is, by cosine)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.retrieval.ranking import top

Vectors = NDArray[np.float32]
_ROWS = 65_536  # of vectors multiplied at once
_TEXTS = 64  # given to the engine at once
PROBE = "What can be found here? 这里能找到什么？"
"""Its vector is kept with an index: a model that gives it another one is not the model of that index."""


class Embedder(Protocol):
    """The part of an `Engine` that is needed: a model trained by `train.embed`, or any other that has hidden states."""

    context: int

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """A vector for each text."""

    def encode(self, text: str) -> list[int]:
        """The text's token ids."""


def embed(engine: Embedder, texts: Sequence[str], tell: Callable[[int], None] = lambda done: None) -> Vectors:
    """(len(texts), d) vectors of length 1. What a text has beyond the model's context is left out."""
    rows: list[Vectors] = []
    for start in range(0, len(texts), _TEXTS):
        some = [fitted(engine, text) for text in texts[start : start + _TEXTS]]
        rows.append(unit(np.array(engine.embed(some), np.float32)))
        tell(start + len(some))
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)


def fitted(engine: Embedder, text: str) -> str:
    """The beginning of a text that a model can read, two places left for what its tokenizer adds."""
    room = max(1, engine.context - 2)
    while len(text) > 1 and (size := len(engine.encode(text))) > room:
        text = text[: max(1, min(len(text) - 1, len(text) * room // size))]
    return text


def unit(vectors: Vectors) -> Vectors:
    """Each row divided by its length; zero stays zero. Raises FledgeError where one is not finite."""
    if not np.isfinite(vectors).all():
        raise FledgeError(Problem(t("the model gave no numbers (NaN or infinity)")))
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)


def nearest(vectors: Vectors, query: Vectors, k: int) -> list[tuple[int, float]]:
    """The k rows with the highest inner product with `query` (d,), best first; of equal ones the first. Exact: every
    row is looked at, `_ROWS` at a time."""
    products = [vectors[start : start + _ROWS] @ query for start in range(0, len(vectors), _ROWS)]
    scores = np.concatenate(products) if products else np.zeros(0, np.float32)
    return [(row, float(scores[row])) for row in top(scores, k)]
