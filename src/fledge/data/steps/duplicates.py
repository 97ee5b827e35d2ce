"""Duplicates: of texts that are the same, or nearly, one stays. A conversation is compared whole."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from pydantic import Field

from fledge.data.steps.base import CorpusStep, Rejected
from fledge.data.texts import text_of, units
from fledge.records.kinds import Labelled, Record


class ExactDedup(CorpusStep, name="exact_dedup"):
    """Texts that differ in nothing but case, white space, punctuation and width are one; the longest stays, of
    equally long ones that with the smallest id. The same text under two labels is two."""

    def decide(self, records: Iterable[Record]) -> dict[int, Rejected]:
        keys: list[bytes] = []
        best: dict[bytes, tuple[int, str, int]] = {}  # key → (-length, id, position) of the one that stays
        for index, record in enumerate(records):
            text = text_of(record)
            keys.append(_key(record, text))
            rank = (-len(text), record.id, index)
            best[keys[-1]] = min(best.get(keys[-1], rank), rank)
        return {i: Rejected("same text", best[key][1]) for i, key in enumerate(keys) if best[key][2] != i}


class NearDedup(CorpusStep, name="minhash"):
    """Of nearly equal texts (MinHash, Broder, 1997; the setting of FineWeb, Penedo et al., 2024) one stays: the
    longest, then that with the smallest id. See `data.near_duplicates`."""

    ngram: int = Field(5, ge=1, description="units in a shingle: words, or characters where words are not spaced")
    bands: int = Field(14, ge=1, description="bands of the signature")
    rows: int = Field(8, ge=1, description="hashes in a band")
    threshold: float = Field(0.7, ge=0, le=1, description="share of the signature in which two texts must agree")

    def decide(self, records: Iterable[Record]) -> dict[int, Rejected]:
        import numpy as np

        from fledge.data.near_duplicates import MinHash, clusters, ranking

        minhash = MinHash(self.ngram, self.bands, self.rows)
        positions, signatures, keys = [], [], []
        for index, record in enumerate(records):
            text = text_of(record)
            signature = minhash.signature(text)
            if signature is not None:
                positions.append(index)
                signatures.append(signature)
                keys.append((len(text), record.id))
        if not positions:
            return {}
        leaders = clusters(minhash, np.stack(signatures), ranking(keys), self.threshold)
        return {
            positions[i]: Rejected("nearly the same text", keys[leader][1])
            for i, leader in enumerate(leaders.tolist())
            if leader != i
        }


def _key(record: Record, text: str) -> bytes:
    normal = " ".join(units(text)) or text
    label = record.label if isinstance(record, Labelled) else ""
    return blake2b(f"{normal}\x1f{label}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
