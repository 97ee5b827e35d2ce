"""Duplicates: of texts that are the same, or nearly, one stays. A conversation is compared whole."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from pydantic import Field

from fledge.data.chunk import Chunk
from fledge.data.steps.base import CorpusStep, Sketches
from fledge.data.texts import units

if TYPE_CHECKING:
    import pyarrow as pa


class ExactDedup(CorpusStep, name="exact_dedup"):
    """Texts that differ in nothing but case, white space, punctuation and width are one; the longest stays, of
    equally long ones that with the smallest id. The same text under two labels is two."""

    def sketch(self, chunk: Chunk) -> pa.Table:
        import pyarrow as pa

        labels = chunk.rows["label"].to_pylist() if chunk.kind == "labelled" else [""] * len(chunk)
        keys = [
            _key(text, words, label)
            for text, words, label in zip(chunk.texts, chunk.of_each(units), labels, strict=True)
        ]
        return pa.table(
            {
                "row": pa.array(range(len(chunk)), pa.int64()),
                "key": pa.array(keys, pa.binary(16)),
                "length": pa.array(map(len, chunk.texts), pa.int64()),
                "id": pa.array(chunk.ids, pa.string()),
            }
        )

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        before = {key for corpus in earlier for table in corpus.tables(["key"]) for key in table["key"].to_pylist()}
        best: dict[bytes, tuple[int, str, int]] = {}  # key → (-length, id, row) of the one that stays
        lines = [line for table in sketches.tables() for line in table.to_pylist()]
        for line in lines:
            rank = (-line["length"], line["id"], line["row"])
            best[line["key"]] = min(best.get(line["key"], rank), rank)
        verdicts = []
        for line in lines:
            if line["key"] in before:
                verdicts.append((line["row"], "same text as in an earlier corpus", ""))
            elif best[line["key"]][2] != line["row"]:
                verdicts.append((line["row"], "same text", best[line["key"]][1]))
        return verdict_table(verdicts)


class NearDedup(CorpusStep, name="minhash"):
    """Of nearly equal texts (MinHash, Broder, 1997; the setting of FineWeb, Penedo et al., 2024) one stays: the
    longest, then that with the smallest id. See `data.near_duplicates`."""

    ngram: int = Field(5, ge=1, description="units in a shingle: words, or characters where words are not spaced")
    bands: int = Field(14, ge=1, description="bands of the signature")
    rows: int = Field(8, ge=1, description="hashes in a band")
    threshold: float = Field(0.7, ge=0, le=1, description="share of the signature in which two texts must agree")

    def sketch(self, chunk: Chunk) -> pa.Table:
        import pyarrow as pa

        from fledge.data.near_duplicates import MinHash

        minhash, width = MinHash(self.ngram, self.bands, self.rows), 4 * self.bands * self.rows
        signatures = [minhash.signature(text) for text in chunk.texts]
        rows = [row for row, signature in enumerate(signatures) if signature is not None]
        return pa.table(
            {
                "row": pa.array(rows, pa.int64()),
                "signature": pa.array([s.tobytes() for s in signatures if s is not None], pa.binary(width)),
                "length": pa.array([len(chunk.texts[row]) for row in rows], pa.int64()),
                "id": pa.array([chunk.ids[row] for row in rows], pa.string()),
            }
        )

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        import numpy as np

        from fledge.data.near_duplicates import MinHash, clusters, ranking

        lines = [line for table in sketches.tables() for line in table.to_pylist()]
        if not lines:
            return verdict_table([])
        signatures = np.stack([np.frombuffer(line["signature"], dtype=np.uint32) for line in lines])
        minhash = MinHash(self.ngram, self.bands, self.rows)
        leaders = clusters(
            minhash, signatures, ranking([(line["length"], line["id"]) for line in lines]), self.threshold
        )
        return verdict_table(
            [
                (lines[i]["row"], "nearly the same text", lines[leader]["id"])
                for i, leader in enumerate(leaders.tolist())
                if leader != i
            ]
        )


def verdict_table(verdicts: list[tuple[int, str, str]]) -> pa.Table:
    """(row, reason, value) as what `CorpusStep.apply` reads, sorted by row."""
    import pyarrow as pa

    columns = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("value", pa.string())])
    return pa.Table.from_pylist(
        [dict(zip(columns.names, verdict, strict=True)) for verdict in sorted(verdicts)], columns
    )


def _key(text: str, words: list[str], label: str) -> bytes:
    normal = " ".join(words) or text
    return blake2b(f"{normal}\x1f{label}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
