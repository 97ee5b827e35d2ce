"""Duplicates: of texts that are the same, or nearly, one stays. A conversation is compared whole; the same text under
two labels is two. Which one stays: one of an earlier corpus, the longest, that with the smallest hash of its id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from fledge.data.chunk import Chunk
from fledge.data.steps.base import CorpusStep, Sketches

if TYPE_CHECKING:
    import pyarrow as pa

    from fledge.data.dedup.minhash import MinHash
    from fledge.data.ngrams import Words64


class ExactDedup(CorpusStep, name="exact_dedup"):
    """Texts that differ in nothing but case, white space, punctuation and width are one."""

    def sketch(self, chunk: Chunk) -> pa.Table:
        import pyarrow as pa

        from fledge.data.dedup.corpora import rank_columns
        from fledge.data.dedup.exact import keys

        first, second, _ = keys(chunk.texts, _labels(chunk))
        return pa.table({**rank_columns(chunk), "key": first, "check": second})

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        from fledge.data.dedup.corpora import Corpora
        from fledge.data.dedup.exact import same

        corpora = Corpora(sketches, earlier)
        return corpora.verdicts(*same(corpora), "same text")


class NearDedup(CorpusStep, name="minhash"):
    """Of nearly equal texts one stays (MinHash, Broder, 1997; the setting of FineWeb, Penedo et al., 2024). See
    `data.dedup.minhash`."""

    ngram: int = Field(5, ge=1, description="units in a shingle: words, or characters where words are not spaced")
    bands: int = Field(14, ge=1, description="bands of the signature")
    rows: int = Field(8, ge=1, description="hashes in a band")
    threshold: float = Field(0.7, ge=0, le=1, description="share of the signature in which two texts must agree")

    def sketch(self, chunk: Chunk) -> pa.Table:
        import pyarrow as pa

        from fledge.data.dedup.corpora import rank_columns

        minhash = self._minhash()
        rows, signatures = minhash.signatures(chunk.texts, _labels(chunk))
        table = pa.table(rank_columns(chunk)).take(pa.array(rows))
        # the bands' keys are made here, where many processes work, and not where one decides
        for name, array in (("signature", signatures), ("bands", minhash.bands_of(signatures))):
            width = pa.binary(array.itemsize * array.shape[1])
            column = pa.FixedSizeBinaryArray.from_buffers(width, len(rows), [None, pa.py_buffer(array.tobytes())])
            table = table.append_column(name, column)
        return table

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        from fledge.data.dedup.corpora import Corpora
        from fledge.data.dedup.minhash import clusters

        corpora = Corpora(sketches, earlier)
        rows, labels = clusters(self._minhash(), corpora, self.threshold)
        return corpora.verdicts(rows, corpora.best_of(rows, labels), "nearly the same text")

    def _minhash(self) -> MinHash:
        from fledge.data.dedup.minhash import MinHash

        return MinHash(self.ngram, self.bands, self.rows)


class SimHashDedup(CorpusStep, name="simhash"):
    """Of texts whose 64-bit fingerprints differ in few places one stays (SimHash, Charikar, 2002). It wants less disk
    than minhash and sees less: for long texts that differ little. See `data.dedup.simhash`."""

    ngram: int = Field(3, ge=1, description="units in a gram: words, or characters where words are not spaced")
    distance: int = Field(3, ge=0, le=16, description="places in which two fingerprints may differ")
    blocks: int = Field(
        6, ge=1, le=32, description="pieces of a fingerprint, more than distance: more tables, fewer candidates in each"
    )

    @model_validator(mode="after")
    def _blocks_suffice(self) -> Self:
        if self.blocks <= self.distance:
            raise ValueError("blocks must be more than distance")
        return self

    def sketch(self, chunk: Chunk) -> pa.Table:
        import pyarrow as pa

        from fledge.data.dedup.corpora import rank_columns
        from fledge.data.dedup.simhash import simhashes

        rows, words = simhashes(chunk.texts, self.ngram, _labels(chunk))
        return pa.table(rank_columns(chunk)).take(pa.array(rows)).append_column("simhash", pa.array(words))

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        from fledge.data.dedup.corpora import Corpora
        from fledge.data.dedup.simhash import clusters

        corpora = Corpora(sketches, earlier)
        rows, labels = clusters(corpora, self.distance, self.blocks)
        return corpora.verdicts(rows, corpora.best_of(rows, labels), "nearly the same text")


def _labels(chunk: Chunk) -> Words64 | None:
    """(n,) a number for each row's label; None where rows have none."""
    if chunk.kind != "labelled":
        return None
    import numpy as np

    from fledge.data.ngrams import hash64

    labels = chunk.rows["label"].to_pylist()
    return np.fromiter((hash64(label or "") for label in labels), dtype=np.uint64, count=len(labels))
