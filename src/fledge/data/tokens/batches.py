"""Batch sources: `batch(step)` is a pure function of the step, which is how a resumed run sees what it would have seen.

There is no iterator state to save. Every source knows `len(source)`, the steps of one epoch, and goes on for ever:
step s belongs to epoch s // len(source), and each epoch has its own order, drawn from the seed. Orders come from
integer hashing (splitmix64), so that they depend on no library's version.

Labels stand where their tokens stand (`labels[b, t]` is `input_ids[b, t]` or -100): the loss shifts by one, as in
transformers. Numpy only; the trainer makes tensors of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fledge.data.ngrams import mix
from fledge.data.tokens.packing import TokenShards

Ids = NDArray[np.int64]
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One batch. `attention_mask` is None for packed rows, whose boundaries stand in `position_ids`."""

    input_ids: Ids  # (B, T)
    labels: Ids  # (B, T), -100 where there is nothing to learn
    position_ids: Ids  # (B, T)
    attention_mask: Ids | None = None  # (B, T), 1 on tokens, 0 on padding
    source: Ids | None = None  # (B, T), which of the batch source's `sources` a token comes from

    @property
    def targets(self) -> int:
        """Tokens that the loss counts: the first of a row has nothing before it."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs, row for row: `chosen` and `rejected` share a prompt. `weights` (B,) is each pair's share of its prompt."""

    chosen: Batch
    rejected: Batch
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.weights)


class Row(Protocol):
    """What a renderer gives: ids and, for each, 1.0 where it is to be learned (`records.chat.Rendered`)."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def weights(self) -> Sequence[float]: ...


B = TypeVar("B", covariant=True)


class BatchSource(Protocol[B]):
    """`len()` is the steps of one epoch; `batch(step)` is defined for every step ≥ 0 and depends on nothing else."""

    def __len__(self) -> int: ...

    def batch(self, step: int) -> B: ...


def permutation(n: int, *seeds: int) -> Ids:
    """A pseudo-random order of n things that depends on the seeds alone (splitmix64 of the index, sorted)."""
    step = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros(1, dtype=np.uint64)
    for seed in seeds:
        state = mix(state + np.array([seed & (2**64 - 1)], dtype=np.uint64) + step)
    return np.argsort(mix(np.arange(n, dtype=np.uint64) * step + state), kind="stable").astype(np.int64)


class PackedBatches:
    """Rows of `seq_len` tokens cut from the documents' stream, nothing padded and nothing lost.

    Each epoch puts the documents in a new order, joins them into one circular stream of N tokens and cuts it into
    R = ⌈N / (seq_len - 1)⌉ rows that overlap by one token: the last of one row, where it is a target, is the first of
    the next, where it is context. So every token is a target exactly once an epoch; the last row, where it is short,
    is filled from the stream's beginning, and those few tokens are seen twice. The rows are then shuffled, so that
    a batch mixes documents however long they are. Positions restart at each document (and at each row), which is
    what keeps attention inside a document.

    `sources` names what the documents come from, with the number of documents of each, in their order: batches then
    say it of every token.
    """

    def __init__(
        self, shards: TokenShards, seq_len: int, batch_size: int, seed: int, sources: Mapping[str, int] | None = None
    ) -> None:
        if seq_len < 2 or batch_size < 1:
            raise ValueError("seq_len must be at least 2 and batch_size at least 1")
        if not len(shards):
            raise ValueError("there is no token to train on")
        self.shards, self.seq_len, self.batch_size, self.seed = shards, seq_len, batch_size, seed
        self.rows = -(-len(shards) // (seq_len - 1))
        self.sources = tuple(sources or ())
        self._origin = np.repeat(np.arange(len(self.sources)), list((sources or {}).values()))  # of each document
        if self.sources and len(self._origin) != shards.documents:
            raise ValueError(f"{len(self._origin)} documents have a source, of {shards.documents}")
        self._epoch = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        """Steps after which every token has been a target at least once."""
        return -(-self.rows // self.batch_size)

    def batch(self, step: int) -> Batch:
        """(B, T) arrays of rows step·B … step·B + B - 1 of the endless run of epochs."""
        rows = [
            self._row(*divmod(index, self.rows))
            for index in range(step * self.batch_size, (step + 1) * self.batch_size)
        ]
        ids, positions, origin = (np.stack(part) for part in zip(*rows, strict=True))
        return Batch(ids, ids.copy(), positions, source=origin if self.sources else None)

    def _order(self, epoch: int) -> tuple[Ids, Ids, Ids]:
        """Of one epoch: the documents' order, where each starts in the stream (D + 1), the rows' order."""
        documents = permutation(self.shards.documents, self.seed, epoch, 1)
        lengths = np.diff(self.shards.starts)[documents]
        return documents, np.concatenate([[0], np.cumsum(lengths)]), permutation(self.rows, self.seed, epoch, 2)

    def _row(self, epoch: int, index: int) -> tuple[Ids, Ids, Ids]:
        documents, starts, rows = self._epoch(epoch)
        total = len(self.shards)
        ids, positions = np.empty(self.seq_len, dtype=np.int64), np.empty(self.seq_len, dtype=np.int64)
        origin = np.zeros(self.seq_len if self.sources else 0, dtype=np.int64)
        at, filled = int(rows[index]) * (self.seq_len - 1) % total, 0
        document = int(np.searchsorted(starts, at, side="right")) - 1
        while filled < self.seq_len:
            count = min(self.seq_len - filled, int(starts[document + 1]) - at)
            source = int(self.shards.starts[documents[document]]) + at - int(starts[document])
            ids[filled : filled + count] = self.shards.tokens[source : source + count]
            positions[filled : filled + count] = np.arange(count)
            if self.sources:
                origin[filled : filled + count] = self._origin[documents[document]]
            filled += count
            document = (document + 1) % len(documents)
            at = int(starts[document])
        return ids, positions, origin


def _check_sizes(batch_size: int, max_length: int) -> None:
    if batch_size < 1 or max_length < 2:
        raise ValueError("batch_size must be at least 1 and max_length at least 2")


def _teaches(row: Row, max_length: int) -> bool:
    """Whether anything is to be learned within the first `max_length` tokens; the first has nothing before it."""
    return any(weight > 0 for weight in row.weights[1:max_length])


def _largest(lengths: Ids, batches: Sequence[Ids], padded: bool = True) -> int:
    """Which of some batches has most tokens, with or without padding."""
    return int(np.argmax([lengths[b].max() * len(b) if padded else lengths[b].sum() for b in batches]))


class ConversationBatches:
    """Rendered rows, padded on the right, rows of like length together; or laid end to end.

    Each epoch shuffles the rows, sorts windows of `window` batches by length, cuts batches and shuffles those.
    A row longer than `max_length` keeps its first tokens; a row on which then nothing is to be learned is left out
    and counted in `dropped`. The last batch of an epoch may be smaller. Lengths are rounded up to a multiple of
    `multiple`, which keeps the number of shapes small.

    With `row_tokens` a batch's rows are laid end to end in longer rows of about so many tokens (`joined`): the same
    loss without the padding. Batches are then drawn without regard to length.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        max_length: int,
        pad_id: int,
        seed: int,
        multiple: int = 8,
        window: int = 32,
        row_tokens: int = 0,
    ) -> None:
        _check_sizes(batch_size, max_length)
        self.rows = [row for row in rows if _teaches(row, max_length)]
        self.dropped = len(rows) - len(self.rows)
        if not self.rows:
            raise ValueError("there is no row on which anything is to be learned")
        self.batch_size, self.max_length, self.pad_id, self.seed = batch_size, max_length, pad_id, seed
        self.multiple, self.row_tokens = multiple, row_tokens
        window = 1 if row_tokens else window
        self._lengths = lengths = np.array([min(len(row.ids), max_length) for row in self.rows], dtype=np.int64)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: grouped(lengths, batch_size, window, seed, epoch))

    @property
    def tokens(self) -> int:
        """Tokens of one epoch, without padding."""
        return int(self._lengths.sum())

    def __len__(self) -> int:
        """Steps of one epoch: every row once."""
        return -(-len(self.rows) // self.batch_size)

    def largest(self, steps: int) -> int:
        """The step of the first `steps`, and of the first epoch, whose batch is largest."""
        return _largest(self._lengths, self._epoch(0)[:steps], padded=not self.row_tokens)

    def rows_at(self, step: int) -> list[Row]:
        """The rows of a step, as they were rendered."""
        epoch, index = divmod(step, len(self))
        return [self.rows[i] for i in self._epoch(epoch)[index]]

    def batch(self, step: int) -> Batch:
        rows = self.rows_at(step)
        if self.row_tokens:
            return joined(rows, self.max_length, self.pad_id, self.row_tokens, self.multiple)
        return padded(rows, self.max_length, self.pad_id, self.multiple)


@dataclass(frozen=True)
class Pair:
    """Two rendered answers to one prompt. `weight` is 1 / (pairs of that prompt) where a prompt has several."""

    chosen: Row
    rejected: Row
    weight: float = 1.0


class PreferenceBatches:
    """Pairs of rendered rows. A pair one of whose sides has nothing left to learn within `max_length` is left out."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        batch_size: int,
        max_length: int,
        pad_id: int,
        seed: int,
        multiple: int = 8,
        window: int = 32,
    ) -> None:
        _check_sizes(batch_size, max_length)
        self.pairs = [p for p in pairs if _teaches(p.chosen, max_length) and _teaches(p.rejected, max_length)]
        self.dropped = len(pairs) - len(self.pairs)
        if not self.pairs:
            raise ValueError("there is no pair on which anything is to be learned")
        self.batch_size, self.max_length, self.pad_id, self.seed = batch_size, max_length, pad_id, seed
        self.multiple = multiple
        longest = [min(max(len(p.chosen.ids), len(p.rejected.ids)), max_length) for p in self.pairs]
        self._lengths = lengths = np.array(longest, dtype=np.int64)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: grouped(lengths, batch_size, window, seed, epoch))

    def __len__(self) -> int:
        """Steps of one epoch: every pair once."""
        return -(-len(self.pairs) // self.batch_size)

    def largest(self, steps: int) -> int:
        """The step of the first `steps`, and of the first epoch, whose batch is largest."""
        return _largest(self._lengths, self._epoch(0)[:steps])

    def batch(self, step: int) -> PreferenceBatch:
        epoch, index = divmod(step, len(self))
        pairs = [self.pairs[i] for i in self._epoch(epoch)[index]]
        chosen, rejected = (
            padded(rows, self.max_length, self.pad_id, self.multiple)
            for rows in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
        )
        return PreferenceBatch(chosen, rejected, np.array([pair.weight for pair in pairs], dtype=np.float64))


def padded(rows: Sequence[Row], max_length: int, pad_id: int, multiple: int = 8) -> Batch:
    """Rows cut to `max_length`, padded on the right to the longest of them, rounded up to `multiple`."""
    longest = min(max(len(row.ids) for row in rows), max_length)
    shape = (len(rows), min(-(-longest // multiple) * multiple, max(max_length, longest)))
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for b, row in enumerate(rows):
        kept = np.asarray(row.ids[:max_length], dtype=np.int64)
        ids[b, : len(kept)], mask[b, : len(kept)] = kept, 1
        labels[b, : len(kept)] = np.where(np.asarray(row.weights[:max_length]) > 0, kept, IGNORED)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int64), shape).copy()
    return Batch(ids, labels, positions, mask)


def joined(rows: Sequence[Row], max_length: int, pad_id: int, row_tokens: int, multiple: int = 8) -> Batch:
    """Rows cut to `max_length` and laid end to end in as few rows of about `row_tokens` tokens as hold them.

    Positions restart where a row begins, which keeps rows apart; its first token is no target, whatever stands before
    it. The longest goes first, each to where least is (Graham, 1969): what is left open at the end, a few tokens, is
    filled with `pad_id`, one document for each row. Order within the batch does not change the loss.
    """
    kept = sorted(((row.ids[:max_length], row.weights[:max_length]) for row in rows), key=lambda row: -len(row[0]))
    total = sum(len(ids) for ids, _ in kept)
    bins: list[list[tuple[Sequence[int], Sequence[float]]]] = [[] for _ in range(max(1, round(total / row_tokens)))]
    filled = [0] * len(bins)
    for row in kept:
        least = filled.index(min(filled))
        bins[least].append(row)
        filled[least] += len(row[0])
    shape = (len(bins), -(-max(filled) // multiple) * multiple)
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for b, held in enumerate(bins):
        at = 0
        for tokens, weights in held:
            end = at + len(tokens)
            ids[b, at:end], positions[b, at:end] = tokens, np.arange(len(tokens))
            labels[b, at + 1 : end] = np.where(np.asarray(weights)[1:] > 0, ids[b, at + 1 : end], IGNORED)
            at = end
        positions[b, at:] = np.arange(shape[1] - at)
    return Batch(ids, labels, positions)


def grouped(lengths: Ids, batch_size: int, window: int, seed: int, epoch: int) -> list[Ids]:
    """Batches of row numbers for one epoch. Only the very last window can hold a batch that is not full."""
    order = permutation(len(lengths), seed, epoch, 1)
    batches: list[Ids] = []
    for start in range(0, len(order), window * batch_size):
        some = order[start : start + window * batch_size]
        some = some[np.argsort(lengths[some], kind="stable")]
        batches += [some[i : i + batch_size] for i in range(0, len(some), batch_size)]
    return [batches[i] for i in permutation(len(batches), seed, epoch, 2)]
