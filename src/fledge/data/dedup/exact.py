"""Texts that are the same: a digest of 128 bits for each, sorted out of core."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from fledge.data.dedup.buckets import Buckets, leaders
from fledge.data.dedup.corpora import RANK, Corpora
from fledge.data.dedup.units import Units
from fledge.data.ngrams import Words64

Integers = NDArray[np.int64]


def keys(texts: list[str], salt: Words64 | None = None) -> tuple[Words64, Words64, Integers]:
    """Two halves of a digest (BLAKE2b) of each text's units, or of the text itself where it has none; and how many
    units it has."""
    found = Units.of(texts)
    hashes, bounds = found.hashes.astype("<u8").tobytes(), (8 * found.bounds).tolist()
    digests = np.empty((len(texts), 2), dtype="<u8")
    for row, text in enumerate(texts):
        start, end = bounds[row], bounds[row + 1]
        said = hashes[start:end] if end > start else b"\x00" + text.encode("utf-8", "surrogatepass")
        label = b"" if salt is None else int(salt[row]).to_bytes(8, "little")
        digests[row] = np.frombuffer(blake2b(said, digest_size=16, key=label).digest(), dtype="<u8")
    return digests[:, 0].copy(), digests[:, 1].copy(), found.counts


def same(corpora: Corpora) -> tuple[Integers, Integers]:
    """The rows whose text occurs again, sorted, and for each the one that stays. Of sketches with the columns row,
    length, name, key and check."""
    dtype = np.dtype([("key", "<u8"), ("check", "<u8"), *RANK])
    buckets = Buckets(corpora.scratch / "keys", dtype, corpora.rows, identity=2)
    for table in corpora.tables(["row", "length", "name", "key", "check"]):
        records = corpora.ranked(table, dtype)
        records["key"], records["check"] = table["key"].to_numpy(), table["check"].to_numpy()
        buckets.add(records)
    found = [np.zeros((2, 0), dtype=np.int64)]
    for records in buckets.groups():
        best = leaders(records, ("key", "check"))
        new = records["row"] >= corpora.first
        found.append(np.stack([records["row"], records["row"][best]])[:, new])
    rows, best = np.concatenate(found, axis=1)
    order = np.argsort(rows)
    return rows[order], best[order]
