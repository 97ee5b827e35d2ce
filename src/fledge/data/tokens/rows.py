"""Packed rows of token ids on disk, and reading them: what `data.pack` writes and a training run is fed with.

A folder holds, for every shard, `tokens/part-00000.bin` (R × seq_len ids, uint16 where the vocabulary allows, else
uint32, little-endian) and `tokens/part-00000.begins` (a bit for each id: a piece begins here), and `index.json`,
written last, with the number of rows and the SHA-256 of every file.

A *piece* is a stretch of one document that is learned by itself: its positions count from 0, nothing attends from it
to another piece, and nothing predicts its first token. A document that fits into a row is one piece, `separator,
its text, separator`, so that its first token and its end are both learned. A longer one is several, each of which
begins with the last token of the one before: context alone, and no token goes unlearned. What is left over at the end
of a row is filled with separators that are pieces of a single token each, of which nothing is learned.

The order of reading is computed, not stored: row n of the endless run of epochs is a pure function of the seed and n,
so that a run goes on at any token, with another batch size, on another number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.ngrams import Words64, mix
from fledge.data.tokens.batches import IGNORED, Batch, BatchSource, Ids

T = TypeVar("T")
INDEX, TOKENS = "index.json", "tokens"
WINDOW = 4096  # places whose rows are computed together
_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class TokenRows:
    """An open folder of packed rows. Files are memory-mapped: opening costs nothing, and processes share the pages."""

    folder: Path
    index: dict[str, Any]
    tokens: tuple[NDArray[Any], ...]  # of each shard (R, T)
    begins: tuple[NDArray[np.uint8], ...]  # of each shard (R, ceil(T / 8)), bits from the lowest
    starts: Ids  # the number of each shard's first row, and of all rows at the end

    @classmethod
    def open(cls, folder: Path) -> TokenRows:
        """Raises FledgeError where there is no such folder, or a file is not as long as the index says."""
        if not (folder / INDEX).is_file():
            raise FledgeError(Problem(t("this is no folder of packed tokens"), where=str(folder), allowed=INDEX))
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        seq_len, maps = int(index["seq_len"]), []
        for shard in index["shards"]:
            ids = _map(folder / TOKENS / f"{shard['name']}.bin", index["dtype"], (shard["rows"], seq_len))
            bits = _map(folder / TOKENS / f"{shard['name']}.begins", "u1", (shard["rows"], -(-seq_len // 8)))
            maps.append((ids, bits))
        starts = np.cumsum([0, *(shard["rows"] for shard in index["shards"])], dtype=np.int64)
        return cls(folder, index, tuple(m[0] for m in maps), tuple(m[1] for m in maps), starts)

    def __len__(self) -> int:
        """Rows."""
        return int(self.starts[-1])

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return int(self.index["seq_len"])

    @property
    def tokens_held(self) -> int:
        """Places for tokens, fillings included."""
        return len(self) * self.seq_len

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the index. Raises FledgeError naming the first that differs."""
        for shard in self.index["shards"]:
            for ending, expected in shard["sha256"].items():
                file = self.folder / TOKENS / f"{shard['name']}.{ending}"
                with file.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                if found != expected:
                    raise FledgeError(Problem(t("this file was damaged"), str(file), found, expected))

    def read(self, numbers: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """(B, T) ids and (B, T) whether a piece begins there, of the rows with these numbers."""
        ids = np.empty((len(numbers), self.seq_len), dtype=np.int64)
        bits = np.empty((len(numbers), -(-self.seq_len // 8)), dtype=np.uint8)
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        for shard in np.unique(shards):
            at = np.flatnonzero(shards == shard)
            inside = numbers[at] - self.starts[shard]
            ids[at], bits[at] = self.tokens[shard][inside], self.begins[shard][inside]
        begins = np.unpackbits(bits, axis=1, count=self.seq_len, bitorder="little").view(np.bool_)
        return ids, begins

    def pieces(self, number: int) -> list[Ids]:
        """The pieces of one row, fillings left out."""
        ids, begins = self.read(np.array([number]))
        borders = [*np.flatnonzero(begins[0]).tolist(), self.seq_len]
        return [ids[0, a:b] for a, b in pairwise(borders) if b - a > 1]


def _map(file: Path, dtype: str, shape: tuple[int, int]) -> NDArray[Any]:
    size = np.dtype(dtype).itemsize * shape[0] * shape[1]
    if not file.is_file() or file.stat().st_size != size:
        found = str(file.stat().st_size) if file.is_file() else ""
        raise FledgeError(Problem(t("this file is missing or was cut short"), str(file), found, str(size)))
    return np.memmap(file, dtype=dtype, mode="r", shape=shape) if size else np.zeros(shape, dtype=dtype)


class Shuffle:
    """A pseudo-random order of 0 … n - 1, computed place by place: no list of n numbers is made or kept.

    A Feistel network over a × b ≥ n with a, b ≈ √n, walked until it comes back into range (Black and Rogaway, 2002).
    """

    ROUNDS = 6

    def __init__(self, n: int, *seeds: int) -> None:
        self.n = n
        self.a = int(np.ceil(np.sqrt(max(n, 1))))
        self.b = -(-max(n, 1) // self.a)
        state = np.zeros(1, dtype=np.uint64)
        for seed in seeds:
            state = mix(state + np.array([seed & (2**64 - 1)], dtype=np.uint64) + _STEP)
        self.keys: Words64 = mix(state + np.arange(1, self.ROUNDS + 1, dtype=np.uint64) * _STEP)

    def __call__(self, places: Ids) -> Ids:
        """What stands at these places."""
        at = self._once(np.asarray(places).astype(np.uint64))
        while (outside := at >= np.uint64(self.n)).any():
            at[outside] = self._once(at[outside])
        return at.astype(np.int64)

    def _once(self, x: Words64) -> Words64:
        a, b = np.uint64(self.a), np.uint64(self.b)
        left, right = x // b, x % b
        for number, key in enumerate(self.keys):
            if number % 2:
                right = (right + mix(left * _STEP + key) % b) % b
            else:
                left = (left + mix(right * _STEP + key) % a) % a
        return np.asarray(left * b + right)


class RowBatches:
    """Batches of packed rows in a shuffled order, for ever: each row once an epoch, each epoch in another order.

    `first` rows count as read already, and of every batch this is the part of process `rank` among `world`: a run of
    k batches of B rows goes on, whatever it goes on with, as `first = k · B`.
    """

    def __init__(
        self, rows: TokenRows, batch_size: int, seed: int, first: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size < world or not 0 <= rank < world:
            raise ValueError("a batch needs a row for every process, and a rank is below the number of processes")
        if not len(rows):
            raise ValueError("there is no token to train on")
        self.rows, self.batch_size, self.seed, self.first = rows, batch_size, seed, first
        self.mine = slice(batch_size * rank // world, batch_size * (rank + 1) // world)
        self._window = lru_cache(maxsize=2)(self._numbers_of)

    def __len__(self) -> int:
        """Steps after which every row was read."""
        return -(-len(self.rows) // self.batch_size)

    def batch(self, step: int) -> Batch:
        """(B, T) arrays of rows first + step·B … of the endless run of epochs, this process's part of them."""
        start = self.first + step * self.batch_size
        ids, begins = self.rows.read(self.numbers(start + self.mine.start, start + self.mine.stop))
        return as_batch(ids, begins)

    def numbers(self, start: int, stop: int) -> Ids:
        """Which rows stand at places start … stop - 1 of the endless run."""
        found = []
        while start < stop:
            epoch, place = divmod(start, len(self.rows))
            window, offset = divmod(place, WINDOW)
            some = self._window(epoch, window)[offset : offset + stop - start]
            found.append(some)
            start += len(some)
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def _numbers_of(self, epoch: int, window: int) -> Ids:
        """Some thousand neighbouring places at once: it takes no longer than one."""
        places = np.arange(window * WINDOW, min((window + 1) * WINDOW, len(self.rows)))
        return Shuffle(len(self.rows), self.seed, epoch)(places)

    def tokens_from(self, token: int) -> Iterator[Ids]:
        """The endless run of rows one behind the other, from its `token`-th token on, in pieces of a row or less."""
        number, offset = divmod(token, self.rows.seq_len)
        while True:
            yield self.rows.read(self.numbers(number, number + 1))[0][0, offset:]
            number, offset = number + 1, 0


def as_batch(ids: Ids, begins: NDArray[np.bool_]) -> Batch:
    """Rows as the trainer takes them: labels without the pieces' first tokens, positions counted in each piece."""
    begins[:, 0] = True  # as every row that was packed does
    starts = np.flatnonzero(begins.ravel())
    positions = np.arange(ids.size) - np.repeat(starts, np.diff(starts, append=ids.size))
    labels = ids.copy()
    np.putmask(labels, begins, IGNORED)
    return Batch(ids, labels, positions.reshape(ids.shape))


class Prefetched(Generic[T]):
    """A source whose next batches are made by a thread while the caller computes. The batches are the source's own."""

    def __init__(self, source: BatchSource[T], ahead: int = 2) -> None:
        self.source, self.ahead = source, ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._made: dict[int, Future[T]] = {}

    def __len__(self) -> int:
        return len(self.source)

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of what a mixture is made of, where its batches tell rows of different origin apart."""
        return tuple(getattr(self.source, "sources", ()))

    def batch(self, step: int) -> T:
        """The source's batch of the step; those of the next steps are begun."""
        wanted = range(step, step + 1 + self.ahead)
        for left in [s for s in self._made if s not in wanted]:
            self._made.pop(left).cancel()
        for s in wanted:
            if s not in self._made:
                self._made[s] = self._pool.submit(self.source.batch, s)
        return self._made.pop(step).result()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def write_index(folder: Path, shards: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    """`index.json`: what is common to all rows, and every shard's name, rows and digests."""
    from fledge.core.artifact import write_atomic

    write_atomic(folder / INDEX, json.dumps({**facts, "shards": list(shards)}, indent=1, sort_keys=True) + "\n")
