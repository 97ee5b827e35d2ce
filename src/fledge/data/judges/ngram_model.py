"""An n-gram language model that reads: how likely is a text under a reference corpus?

Interpolated modified Kneser–Ney (Chen and Goodman, 1999), estimated in `kneser_ney` and kept as sorted arrays of 64-bit
hashes that are mapped into memory: whole chunks are scored by a few binary searches.

    model = NGramModel.load(path)
    model.perplexities(["the court shall hear the case", "case hear the shall court the"])      # (2,)

A text is one sequence <s> u₁ … uₙ </s>. A unit outside the vocabulary is one of the `unknown_kinds` units that the
corpus held too seldom, each as likely as the others: p(u | c) = p(<unk> | c) / unknown_kinds, so that a string of
noise is not cheap. Of an n-gram that was not seen, or was pruned, p(w | c) = backoff(c) · p(w | c without its first).

On disk, for k = 1 … order: `k.keys.npy` (sorted), `k.logp.npy`, `k.backoff.npy` (natural logarithms, float32; no
back-off for the highest order), `vocabulary.parquet` (unit, count; words only), `ngram.json`, and `tokenizer.json`
where the units are its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fledge.core.artifact import write_atomic
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.ngrams import Words64, hash64, mix, ngrams, unit_hashes
from fledge.data.texts import units

UnitName: TypeAlias = Literal["words", "bytes", "tokens"]
Floats: TypeAlias = NDArray[np.float64]
BEGIN, END, UNKNOWN = (np.uint64(hash64(mark)) for mark in ("<s>", "</s>", "<unk>"))
NOTES, VOCABULARY, TOKENIZER = "ngram.json", "vocabulary.parquet", "tokenizer.json"
_AT_ONCE = 4_000_000  # units scored at once


class Segmenter:
    """Texts as arrays of 64-bit units: words and unspaced characters, UTF-8 bytes, or a tokenizer's tokens."""

    def __init__(self, unit: UnitName, tokenizer: Path | None = None) -> None:
        self.unit, self.file = unit, tokenizer
        if (unit == "tokens") != (tokenizer is not None):
            raise ValueError("tokens need a tokenizer, other units none")

    def __call__(self, texts: Sequence[str]) -> list[Words64]:
        """(n,) hashes for each text."""
        if self.unit == "words":
            return [unit_hashes(units(text)) for text in texts]
        if self.unit == "bytes":
            return [_numbers(np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)) for text in texts]
        from fledge.data.tokens.packing import encode_plain

        return [_numbers(np.asarray(ids, np.uint64)) for ids in encode_plain(self._tokenizer, texts)]

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.file))


def _numbers(values: NDArray[Any]) -> Words64:
    return mix(values.astype(np.uint64) + np.uint64(1))


@dataclass(frozen=True)
class Stream:
    """Several sequences one after another. `room[i]` is how many units of its own sequence stand before unit i."""

    units: Words64
    room: NDArray[np.int64]
    sizes: NDArray[np.int64]  # (sequences,) marks included

    @classmethod
    def of(cls, sequences: Sequence[Words64], marks: bool = True) -> Stream:
        """The sequences, with <s> and </s> around each unless `marks` is False."""
        begin, end = (np.array([mark]) for mark in (BEGIN, END))
        parts = [part for some in sequences for part in ((begin, some, end) if marks else (some,))]
        sizes = np.array([len(some) + 2 * marks for some in sequences], dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        whole = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)
        return cls(whole, np.arange(len(whole)) - np.repeat(starts, sizes), sizes)

    def grams(self, k: int) -> tuple[Words64, NDArray[np.bool_]]:
        """(len(units),) the k-gram that ends at each unit, and where there is one (elsewhere it means nothing)."""
        found = np.zeros(len(self.units), dtype=np.uint64)
        found[k - 1 :] = ngrams(self.units, k)
        return found, self.room >= k - 1

    def sums(self, values: Floats) -> Floats:
        """(sequences,) the sum of one value a unit over each sequence, whatever stands beside it."""
        if not len(values):
            return np.zeros(len(self.sizes))
        starts = np.cumsum(self.sizes) - self.sizes
        sums = np.add.reduceat(np.append(values, 0.0), starts)
        return np.where(self.sizes > 0, sums, 0.0)


@dataclass(frozen=True)
class Order:
    """All k-grams of one k: their hashes, sorted, and natural logarithms beside them."""

    keys: Words64
    logp: NDArray[np.float32]
    backoff: NDArray[np.float32] | None  # None for the highest order

    def find(self, grams: Words64) -> NDArray[np.int64]:
        """(len(grams),) where each stands among the keys, -1 where it does not."""
        if not len(self.keys):
            return np.full(len(grams), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.keys, grams), len(self.keys) - 1)
        return np.where(self.keys[at] == grams, at, -1)


@dataclass(frozen=True)
class Notes:
    """What `ngram.json` says beside the arrays."""

    order: int
    unit: UnitName
    unknown_kinds: int
    vocabulary: int
    trained_units: int
    discounts: tuple[tuple[float, float, float], ...]


class NGramModel:
    """The model. Probabilities are natural logarithms."""

    def __init__(self, orders: Sequence[Order], notes: Notes, segment: Segmenter, folder: Path | None = None) -> None:
        self.orders, self.notes, self.segment, self.folder = tuple(orders), notes, segment, folder

    def logp(self, stream: Stream) -> Floats:
        """(len(stream.units),) ln p of each unit after those before it in its sequence; 0 for <s>.

        At k = 2, 3, … the longer context takes over where its gram is known; where it is not, its back-off is paid.
        """
        marks = stream.units == BEGIN
        known = self.orders[0].find(mix(stream.units))
        strange = (known < 0) & ~marks
        unit = np.where(strange, UNKNOWN, stream.units)
        stream = Stream(unit, stream.room, stream.sizes)
        at = np.where(strange, self._unknown, known)
        total = self.orders[0].logp[at].astype(np.float64)
        for k, order in enumerate(self.orders[1:], start=2):
            shorter = self.orders[k - 2].backoff
            assert shorter is not None
            before = np.concatenate([[-1], at[:-1]])  # the context: the (k−1)-gram that ends at the unit before
            before[stream.room < k - 1] = -1
            maybe = np.flatnonzero((before >= 0) & (at >= 0))  # both shorter grams are known: only then can this be
            longer = np.full(len(at), -1, dtype=np.int64)
            longer[maybe] = order.find(stream.grams(k)[0][maybe])
            paid = np.flatnonzero((before >= 0) & (longer < 0))
            total[paid] += shorter[before[paid]]
            seen = np.flatnonzero(longer >= 0)
            total[seen] = order.logp[longer[seen]]
            at = longer
        total[strange] -= np.log(self.notes.unknown_kinds)
        total[marks] = 0.0
        return total

    def scores(self, sequences: Sequence[Words64]) -> tuple[Floats, NDArray[np.int64]]:
        """For each sequence the sum of ln p, and over how many units: its own and </s>."""
        sums, sizes = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
        first, room = 0, 0
        for last in range(1, len(sequences) + 1):
            room += len(sequences[last - 1])
            if room >= _AT_ONCE or last == len(sequences):
                stream = Stream.of(sequences[first:last])
                sums.append(stream.sums(self.logp(stream)))
                sizes.append(stream.sizes - 1)
                first, room = last, 0
        return np.concatenate(sums), np.concatenate(sizes)

    def perplexities(self, texts: Sequence[str]) -> Floats:
        """(len(texts),) exp of the mean surprise a unit, </s> included."""
        total, size = self.scores(self.segment(texts))
        return np.exp(-total / size)

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Unit → how often the reference corpus has it (words only), the most frequent first."""
        import pyarrow.parquet as pq

        if self.folder is None or not (self.folder / VOCABULARY).is_file():
            return {}
        table = pq.read_table(self.folder / VOCABULARY)
        return dict(zip(table["unit"].to_pylist(), table["count"].to_pylist(), strict=True))

    @cached_property
    def _unknown(self) -> int:
        return int(self.orders[0].find(mix(np.array([UNKNOWN])))[0])

    def save(self, folder: Path, vocabulary: Mapping[str, int]) -> None:
        """Write the arrays, the notes, and the words with their counts."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder.mkdir(parents=True, exist_ok=True)
        for k, order in enumerate(self.orders, start=1):
            for name, array in (("keys", order.keys), ("logp", order.logp), ("backoff", order.backoff)):
                if array is not None:
                    np.save(folder / f"{k}.{name}.npy", array, allow_pickle=False)
        if self.notes.unit == "words":
            words = sorted(vocabulary.items(), key=lambda item: (-item[1], item[0]))
            columns = {
                "unit": pa.array([word for word, _ in words], pa.string()),
                "count": pa.array([count for _, count in words], pa.int64()),
            }
            pq.write_table(pa.table(columns), folder / VOCABULARY, compression="zstd")
        if self.segment.file is not None:
            (folder / TOKENIZER).write_bytes(self.segment.file.read_bytes())
        write_atomic(folder / NOTES, json.dumps(vars(self.notes), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> NGramModel:
        """The model in a folder, its arrays mapped into memory. Raises FledgeError where there is none."""

        def array(name: str) -> Any:
            return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

        try:
            notes = Notes(**json.loads((folder / NOTES).read_text(encoding="utf-8")))
            orders = [
                Order(array(f"{k}.keys"), array(f"{k}.logp"), array(f"{k}.backoff") if k < notes.order else None)
                for k in range(1, notes.order + 1)
            ]
            segment = Segmenter(notes.unit, folder / TOKENIZER if notes.unit == "tokens" else None)
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise FledgeError(
                Problem(
                    t("is not an n-gram model"), where=str(folder), found=f"{type(error).__name__}: {error}"[:200],
                    fix=t("make one: fledge ngram train"),
                )
            ) from None  # fmt: skip
        return cls(orders, notes, segment, folder)
