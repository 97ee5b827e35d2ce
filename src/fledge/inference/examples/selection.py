"""Which examples stand before a question, and in which order (in-context learning).

    selector = Selector(examples_of(read(data, "prompts")), by="similar", order="similar_last")
    selector.select("How many legs has a spider?", k=4)

| by | takes |
|---|---|
| random | any, by the seed and the question |
| similar | the nearest by words (BM25), in English and Chinese |
| embedding | the nearest by a model's vectors (Liu et al., 2022) |
| diverse | near ones that are not alike (MMR; Carbonell and Goldstein, 1998): by vectors where a model is given |
| quality | the best ones, whatever the question: by their own score, else by how likely a model finds their answers |

An example that asks what is asked is never taken: the answer would stand in the prompt. Order matters by itself (Lu et
al., 2022): `order.order_effect` measures how much, over permutations of the same examples.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fledge.core.artifact import digest_of
from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.inference.engine import Engine
from fledge.inference.examples.example import Example
from fledge.inference.examples.likelihood import likelihoods
from fledge.inference.retrieval.bm25 import BM25, Postings
from fledge.inference.retrieval.ranking import mmr, top
from fledge.inference.retrieval.retriever import word_vectors
from fledge.inference.retrieval.vectors import Vectors, embed
from fledge.inference.retrieval.words import Segmenter, resolve, words

By = Literal["random", "similar", "embedding", "diverse", "quality"]
Order = Literal["as_is", "similar_last", "similar_first", "random"]
BYS: tuple[By, ...] = ("random", "similar", "embedding", "diverse", "quality")
ORDERS: tuple[Order, ...] = ("as_is", "similar_last", "similar_first", "random")
_POOL = 50  # how many near examples diversity chooses among


def select(
    pool: Sequence[Example], query: str, k: int, by: By = "similar", order: Order = "similar_last", **options: Any
) -> list[Example]:
    """k examples of the pool for one question; for many, keep a `Selector`. `options` as in its constructor."""
    return Selector(pool, by, order, **options).select(query, k)


class Selector:
    """Chooses examples from a pool. Words, vectors and likelihoods of the pool are computed once, when first needed.

    `engine`: a model that gives vectors (`embedding`, `diverse`) or finds answers likely (`quality`). `diversity` is
    MMR's weight of unlikeness.
    """

    def __init__(
        self,
        pool: Sequence[Example],
        by: By = "similar",
        order: Order = "similar_last",
        *,
        engine: Engine | None = None,
        seed: int = 0,
        diversity: float = 0.3,
        segmenter: Segmenter = "bigrams",
    ) -> None:
        for name, value, allowed in (("by", by, BYS), ("order", order, ORDERS)):
            if value not in allowed:
                raise FledgeError(Problem(t("{name} is out of range", name=name), name, value, listing(allowed)))
        if not pool:
            raise FledgeError(Problem(t("there are no examples to choose from")))
        needs_model = by == "embedding" or (by == "quality" and any(item.quality is None for item in pool))
        if needs_model and engine is None:
            raise FledgeError(
                Problem(t("this way of choosing examples needs a model"), "by", by,
                        fix=t("give one, or a score with every example"))
            )  # fmt: skip
        self.pool, self.by, self.order, self.engine, self.seed = tuple(pool), by, order, engine, seed
        self.diversity, self.segmenter = diversity, resolve(segmenter)

    def select(self, query: str, k: int) -> list[Example]:
        """At most k examples in the order in which they are to stand. Raises FledgeError for k below 0."""
        return [self.pool[place] for place in self.places(query, k)]

    def places(self, query: str, k: int) -> list[int]:
        """The same as places in the pool."""
        if k < 0:
            raise FledgeError(Problem(t("{name} is out of range", name="k"), "k", str(k), "≥ 0"))
        asked = _plain(query)
        allowed = np.array([plain != asked for plain in self._questions])
        k = min(k, int(allowed.sum()))
        if k == 0:
            return []
        similar = self.similarity(query) if self.by != "random" or "similar" in self.order else np.zeros(len(self.pool))
        return self._ordered(self._chosen(query, k, allowed, similar), query, similar)

    def similarity(self, query: str) -> NDArray[Any]:
        """(len(pool),) how near each example's question is: cosines of a model's vectors, or BM25."""
        if self._dense:
            return np.asarray(self._vectors @ embed(self.engine, [query])[0])  # type: ignore[arg-type]
        return self._bm25.scores(self._words(query))

    def _chosen(self, query: str, k: int, allowed: NDArray[np.bool_], similar: NDArray[Any]) -> list[int]:
        if self.by == "random":
            draws = np.random.default_rng(self._seed(query, "choice")).permutation(len(self.pool))
            return [int(place) for place in draws if allowed[place]][:k]
        if self.by == "quality":
            return top(np.where(allowed, self._qualities, -np.inf), k)
        near = top(np.where(allowed, similar, -np.inf), k if self.by != "diverse" else max(_POOL, 4 * k))
        near = [place for place in near if allowed[place]]
        if self.by != "diverse":
            return near
        best = max(float(similar[near[0]]), 1e-9)
        alike = self._likeness
        chosen = mmr(
            [float(similar[place]) / best for place in near],
            lambda i, j: float(alike[near[i]] @ alike[near[j]]),
            k,
            self.diversity,
        )
        return [near[place] for place in chosen]

    def _ordered(self, chosen: list[int], query: str, similar: NDArray[Any]) -> list[int]:
        if self.order == "as_is":
            return sorted(chosen)
        if self.order == "random":
            order = np.random.default_rng(self._seed(query, "order")).permutation(len(chosen))
            return [sorted(chosen)[place] for place in order]
        nearest_first = sorted(chosen, key=lambda place: (-float(similar[place]), place))
        return nearest_first if self.order == "similar_first" else nearest_first[::-1]

    def _seed(self, query: str, purpose: str) -> int:
        """The draw depends on the question and the seed, not on which questions came before."""
        return int(digest_of([self.seed, purpose, _plain(query)])[:15], 16)

    @property
    def _dense(self) -> bool:
        return self.engine is not None and self.by in ("embedding", "diverse")

    def _words(self, text: str) -> list[str]:
        return words(text, self.segmenter)

    @cached_property
    def _questions(self) -> list[str]:
        return [_plain(example.question) for example in self.pool]

    @cached_property
    def _bm25(self) -> BM25:
        return BM25(Postings.of(self._words(example.question) for example in self.pool))

    @cached_property
    def _vectors(self) -> Vectors:
        return embed(self.engine, [example.question for example in self.pool])  # type: ignore[arg-type]

    @cached_property
    def _likeness(self) -> Vectors:
        if self._dense:
            return self._vectors
        return word_vectors([self._words(example.question) for example in self.pool], self._bm25.weight)

    @cached_property
    def _qualities(self) -> NDArray[np.float64]:
        given = [example.quality for example in self.pool]
        if all(quality is not None for quality in given):
            return np.array(given, np.float64)
        return np.array(likelihoods(self.engine, [([], e.question, e.answer) for e in self.pool])[0])  # type: ignore[arg-type]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
