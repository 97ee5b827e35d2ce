"""Batch sources: pure functions of the step, nothing lost, boundaries where documents begin."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fledge.data.tokens.batches import (
    IGNORED,
    Batch,
    ConversationBatches,
    PackedBatches,
    Pair,
    PreferenceBatches,
    joined,
    padded,
    permutation,
)
from fledge.data.tokens.packing import TokenShards, pack


@dataclass(frozen=True)
class Row:
    ids: list[int]
    weights: list[float]


def shards(folder: Path, seed: int = 0, documents: int = 40) -> TokenShards:
    """Documents of 1 to 60 tokens, each token the only one of its kind: (document, place) can be read off it."""
    rng = random.Random(seed)
    return pack([[100 * d + i for i in range(1, rng.randint(2, 60))] for d in range(1, documents)], folder, 0, 10_000)


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "labels", "position_ids"))


def test_permutation_is_one_and_depends_on_the_seeds_alone() -> None:
    order = permutation(1000, 1, 2)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, permutation(1000, 1, 2))
    for other in ((2, 2), (1, 3), (2, 1), (1,)):
        assert (order != permutation(1000, *other)).mean() > 0.9
    assert permutation(5, 42).tolist() == [4, 1, 3, 0, 2], "pinned: orders outlive library versions"
    assert permutation(0, 1).tolist() == []


@pytest.mark.parametrize("seq_len", [2, 7, 33, 256])
def test_every_token_is_a_target_in_every_epoch(tmp_path: Path, seq_len: int) -> None:
    data = shards(tmp_path / "p")
    source = PackedBatches(data, seq_len, batch_size=3, seed=5)
    rows = np.concatenate([source.batch(step).input_ids for step in range(len(source))])[: source.rows]
    targets = Counter(rows[:, 1:].ravel().tolist())
    words = set(data.tokens.tolist()) - {0}
    assert all(targets[word] >= 1 for word in words), "none lost"
    again = source.rows * (seq_len - 1) - len(data)
    assert 0 <= again < seq_len - 1
    assert sum(targets.values()) - len(data) == again, "and no more seen twice than fill the last row"
    assert targets[0] >= data.documents, "the end of each document is learned as well"


def test_positions_restart_at_documents_and_tokens_follow_each_other(tmp_path: Path) -> None:
    source = PackedBatches(shards(tmp_path / "p"), 48, batch_size=4, seed=1)
    for step in range(2 * len(source)):
        batch = source.batch(step)
        assert np.array_equal(batch.labels, batch.input_ids) and batch.attention_mask is None
        for ids, positions in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True):
            assert positions[0] == 0
            for t in range(1, len(ids)):
                if ids[t] == 0:
                    assert positions[t] == 0, "a separator begins its document"
                else:
                    assert positions[t] == positions[t - 1] + 1
                    assert ids[t] == ids[t - 1] + 1 or (ids[t - 1] == 0 and ids[t] % 100 == 1), "inside one document"


def test_batches_are_a_pure_function_of_the_step(tmp_path: Path) -> None:
    data = shards(tmp_path / "p")
    source = PackedBatches(data, 32, 4, seed=9)
    run = [source.batch(step) for step in range(3 * len(source))]
    for step in random.Random(0).sample(range(len(run)), 12):
        fresh = PackedBatches(TokenShards.open(tmp_path / "p"), 32, 4, seed=9)
        assert equal(fresh.batch(step), run[step])
    assert not equal(run[0], PackedBatches(data, 32, 4, seed=10).batch(0))
    assert not equal(run[0], run[len(source)]), "another epoch has another order"


def test_a_batch_mixes_documents_even_when_they_are_long(tmp_path: Path) -> None:
    data = pack([[1 + d] * 1000 for d in range(8)], tmp_path / "p", 0, 100)
    source = PackedBatches(data, 50, 16, seed=0)
    assert all(len(set(source.batch(step).input_ids.ravel().tolist()) - {0}) >= 4 for step in range(len(source)))


def test_one_short_document_is_enough_and_none_is_not(tmp_path: Path) -> None:
    batch = PackedBatches(pack([[7]], tmp_path / "p", 0, 10), 5, 1, seed=0).batch(0)
    assert batch.input_ids.tolist() == [[0, 7, 0, 7, 0]] and batch.position_ids.tolist() == [[0, 1, 0, 1, 0]]
    with pytest.raises(ValueError, match="no token"):
        PackedBatches(pack([], tmp_path / "q", 0, 10), 5, 1, seed=0)


def conversations(n: int = 50, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for i in range(1, n + 1):
        length = rng.randint(3, 40)
        rows.append(Row([100 * i + t for t in range(length)], [float(t >= length // 2) for t in range(length)]))
    return rows


def test_conversations_each_once_an_epoch_padded_and_masked() -> None:
    rows = conversations()
    source = ConversationBatches(rows, batch_size=8, max_length=64, pad_id=3, seed=2)
    seen = Counter[int]()
    for step in range(len(source)):
        batch = source.batch(step)
        assert batch.attention_mask is not None and batch.input_ids.shape[1] % 8 == 0
        for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
            row = rows[int(ids[0]) // 100 - 1]
            seen[int(ids[0])] += 1
            n = len(row.ids)
            assert ids.tolist() == row.ids + [3] * (len(ids) - n)
            assert mask.tolist() == [1] * n + [0] * (len(ids) - n)
            assert labels[:n].tolist() == [i if w else IGNORED for i, w in zip(row.ids, row.weights, strict=True)]
            assert (labels[n:] == IGNORED).all()
        assert batch.targets == int((batch.labels[:, 1:] != IGNORED).sum())
    assert len(seen) == 50 and set(seen.values()) == {1}


def test_rows_of_like_length_go_together() -> None:
    rows = conversations(400)
    grouped = ConversationBatches(rows, 16, 64, 0, seed=1, multiple=1)
    loose = ConversationBatches(rows, 16, 64, 0, seed=1, multiple=1, window=1)

    def padding(source: ConversationBatches) -> int:
        return sum(int((source.batch(s).attention_mask == 0).sum()) for s in range(len(source)))

    assert padding(grouped) < padding(loose) / 3


def test_long_rows_are_cut_and_rows_with_nothing_left_are_dropped() -> None:
    rows = [Row([1, 2, 3, 4], [0.0, 0.0, 0.0, 1.0]), Row([5, 6, 7], [0.0, 1.0, 1.0]), Row([8], [1.0])]
    source = ConversationBatches(rows, 4, max_length=3, pad_id=0, seed=0)
    assert source.dropped == 2 and source.batch(0).input_ids.tolist() == [[5, 6, 7]]
    with pytest.raises(ValueError, match="anything"):
        ConversationBatches(rows[:1], 4, 3, 0, seed=0)


def test_conversation_batches_resume_anywhere() -> None:
    run = [ConversationBatches(conversations(), 8, 64, 0, seed=4).batch(step) for step in range(20)]
    source = ConversationBatches(conversations(), 8, 64, 0, seed=4)
    assert all(equal(source.batch(step), run[step]) for step in (17, 3, 11, 0))
    assert not np.array_equal(run[0].input_ids, run[7].input_ids), "step 7 begins the second epoch"


def test_the_largest_batch_of_a_run_is_known_beforehand() -> None:
    rows = conversations()
    pairs = [Pair(row, row) for row in rows]
    for source, packed in (
        (ConversationBatches(rows, 4, 48, 0, seed=2), False),
        (ConversationBatches(rows, 4, 48, 0, seed=2, row_tokens=64), True),
        (PreferenceBatches(pairs, 4, 48, 0, seed=2), False),
    ):
        batches = [source.batch(step) for step in range(len(source))]
        ids = [getattr(batch, "chosen", batch).input_ids for batch in batches]
        sizes = [np.count_nonzero(found) if packed else found.size for found in ids]
        for steps in (3, len(source), 2 * len(source)):
            assert sizes[source.largest(steps)] == max(sizes[:steps]) > min(sizes[:steps])


def test_pairs_stay_together() -> None:
    pairs = [
        Pair(Row([i, 1, 10 + i], [0.0, 0.0, 1.0]), Row([i, 1, 50 + i, 2], [0.0, 0.0, 1.0, 1.0]), 1 / (1 + i % 3))
        for i in range(20, 43)
    ]
    pairs.append(Pair(Row([1, 2], [0.0, 1.0]), Row([1, 2], [0.0, 0.0])))
    source = PreferenceBatches(pairs, 4, 16, 0, seed=3)
    assert source.dropped == 1 and len(source) == 6
    seen = []
    for step in range(len(source)):
        batch = source.batch(step)
        assert len(batch) == len(batch.chosen) == len(batch.rejected)
        for chosen, rejected, weight in zip(
            batch.chosen.input_ids, batch.rejected.input_ids, batch.weights, strict=True
        ):
            assert chosen[0] == rejected[0] == chosen[2] - 10 == rejected[2] - 50
            assert weight == 1 / (1 + int(chosen[0]) % 3)
            seen.append(int(chosen[0]))
    assert sorted(seen) == list(range(20, 43))


def test_padded_never_grows_past_the_longest_allowed() -> None:
    assert padded([Row([1] * 13, [1.0] * 13)], max_length=10, pad_id=0, multiple=8).input_ids.shape == (1, 10)
    assert padded([Row([1] * 3, [1.0] * 3)], max_length=10, pad_id=0, multiple=8).input_ids.shape == (1, 8)


def test_rows_laid_end_to_end_hold_every_token_once_and_keep_rows_apart() -> None:
    rows = [Row([10 * n + i for i in range(size)], [float(i % 3 > 0) for i in range(size)]) for n, size in
            enumerate([5, 9, 2, 30, 7, 4, 11])]  # fmt: skip
    batch = joined(rows, 20, 0, 24, multiple=4)
    assert batch.attention_mask is None and batch.input_ids.shape[1] % 4 == 0
    assert batch.input_ids.shape[0] == round((5 + 9 + 2 + 20 + 7 + 4 + 11) / 24)
    found = []
    for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
        firsts = [*np.flatnonzero(positions == 0), len(ids)]
        for first, end in pairwise(firsts):
            assert (positions[first:end] == np.arange(end - first)).all()
            found.append((ids[first:end].tolist(), labels[first:end].tolist()))
    for row in rows:
        ids, weights = list(row.ids[:20]), row.weights[:20]
        expected = [IGNORED, *(i if w else IGNORED for i, w in zip(ids[1:], weights[1:], strict=True))]
        assert found.count((ids, expected)) == 1
        found.remove((ids, expected))
    for ids, labels in found:  # what is left is filling
        assert not any(ids) and set(labels) == {IGNORED}


def test_packed_conversations_teach_the_targets_of_padded_ones() -> None:
    rows = [Row(list(range(1, 4 + n)), [0.0, *[1.0] * (2 + n)]) for n in range(13)]
    packed = ConversationBatches(rows, 4, 12, 0, seed=5, row_tokens=32)
    assert len(packed) == 4
    per_epoch = [Counter(int(i) for s in range(4) for i in p.batch(s + 4).labels.flat if i != IGNORED)
                 for p in (packed, ConversationBatches(rows, 4, 12, 0, seed=5))]  # fmt: skip
    assert per_epoch[0] == per_epoch[1]
    again = ConversationBatches(rows, 4, 12, 0, seed=5, row_tokens=32).batch(6)
    assert (again.input_ids == packed.batch(6).input_ids).all()
