"""Search: the passages of an index that answer a query best, by words, by meaning, or by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.retrieval.index import Index
from fledge.inference.retrieval.ranking import fuse, mmr
from fledge.inference.retrieval.reading import Passage
from fledge.inference.retrieval.vectors import Embedder, Vectors, embed, nearest

By = Literal["auto", "words", "vectors", "both"]
_POOL = 4  # times k: how many of each ranking are fused, and among how many diversity chooses
_LEAST = 50


class Retriever:
    """Finds passages. With an `engine` (an embedding model: that of the index) by meaning as well as by words.

        Retriever.open("notes-index").search("What does the boiler cost?", k=4)

    `by`: words (BM25), vectors (cosine), both (reciprocal rank fusion), auto (both where there are vectors and an
    engine). `diversity` above 0 takes passages that are relevant but not alike (MMR), 1 the least alike.
    """

    def __init__(self, index: Index, engine: Embedder | None = None, by: By = "auto", diversity: float = 0.0) -> None:
        if not 0 <= diversity <= 1:
            raise FledgeError(
                Problem(t("{name} is out of range", name="diversity"), "diversity", str(diversity), "0 … 1")
            )
        if by in ("vectors", "both") and engine is None:
            raise FledgeError(
                Problem(t("a search by vectors needs the embedding model of the index"), "by", by, allowed="words")
            )
        if engine is not None and by != "words":
            index.check_embedder(engine)
        self.index, self.engine, self.diversity = index, engine, diversity
        self.by: By = ("both" if engine is not None else "words") if by == "auto" else by

    @classmethod
    def open(cls, folder: Path | str, engine: Embedder | None = None, **options: Any) -> Retriever:
        """A retriever over the index in a folder."""
        return cls(Index.open(folder), engine, **options)

    def search(self, query: str, k: int = 4) -> list[Passage]:
        """The k best passages, best first; fewer where fewer have anything to do with the query. Scores are BM25's,
        cosines, or sums of reciprocal ranks. Passages with the same text are found once.

        Raises FledgeError for an empty query or k below 1.
        """
        if not query.strip():
            raise FledgeError(Problem(t("the query is empty"), "query"))
        if k < 1:
            raise FledgeError(Problem(t("{name} is out of range", name="k"), "k", str(k), "≥ 1"))
        wanted = max(_LEAST, _POOL * k)
        vector = embed(self.engine, [query])[0] if self.engine is not None and self.by != "words" else None
        rankings: list[list[tuple[int, float]]] = []
        if self.by in ("words", "both"):
            rankings.append(self.index.bm25.search(self.index.terms(query), wanted))
        if vector is not None and self.index.vectors is not None:
            rankings.append(nearest(self.index.vectors, vector, wanted))
        ranked = rankings[0] if len(rankings) == 1 else fuse([[item for item, _ in ranking] for ranking in rankings])
        found = _once([self.index.passage(number, score) for number, score in ranked])
        if self.diversity and len(found) > 1:
            found = self._diverse(found, k)
        return found[:k]

    def _diverse(self, found: list[Passage], k: int) -> list[Passage]:
        best = found[0].score
        relevance = [passage.score / best if best > 0 else 0.0 for passage in found]
        vectors = self._alike([passage.searched for passage in found])
        order = mmr(relevance, lambda i, j: float(vectors[i] @ vectors[j]), k, self.diversity)
        return [found[place] for place in order]

    def _alike(self, texts: list[str]) -> Vectors:
        """Vectors by which likeness is measured: the model's, or of the words' weights."""
        if self.engine is not None and self.by != "words":
            return embed(self.engine, texts)
        return word_vectors([self.index.terms(text) for text in texts], self.index.bm25.weight)


def word_vectors(texts: list[list[str]], weight: Any) -> Vectors:
    """(len(texts), words) vectors of length 1: each word of a text at (1 + ln count) · its weight."""
    numbers: dict[str, int] = {}
    for words in texts:
        for word in words:
            numbers.setdefault(word, len(numbers))
    vectors = np.zeros((len(texts), max(1, len(numbers))), np.float32)
    for row, words in enumerate(texts):
        for word in words:
            vectors[row, numbers[word]] += 1
    weights = np.array([weight(word) for word in numbers] or [0.0], np.float32)
    vectors = np.where(vectors > 0, 1 + np.log(np.maximum(vectors, 1)), 0) * weights
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)


def _once(passages: list[Passage]) -> list[Passage]:
    """The first of passages that hold the same text."""
    first: dict[str, Passage] = {}
    for passage in passages:
        first.setdefault(passage.text, passage)
    return list(first.values())
