"""Packed rows: every document is there, learned whole, in an order that any process can take up anywhere."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.core.artifact import Artifact, Tokens
from fledge.core.errors import FledgeError
from fledge.data.tokens import packer
from fledge.data.tokens.batches import IGNORED, Batch
from fledge.data.tokens.packer import Cut, Packing, best_fit, concatenate, pack_shard
from fledge.data.tokens.packing import encode_plain
from fledge.data.tokens.rows import Prefetched, RowBatches, Shuffle, TokenRows
from fledge.data.tokens.stages import Pack
from fledge.data.tokens.tokenizer import save_tokenizer, train_bpe
from fledge.records.kinds import Document, Labelled
from fledge.records.shards import ShardWriter

from .conftest import Runner, corpus, digests, talk, write

LENGTHS = st.lists(st.integers(3, 90), min_size=1, max_size=60)


def rooms_left(lengths: list[int], size: int) -> list[int]:
    """What best-fit-decreasing leaves free in each row, one piece at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else size) - length)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(8, 50))
def test_best_fit_is_best_fit_decreasing(documents: list[int], size: int) -> None:
    laid = best_fit(np.array(documents), size)
    used = np.bincount(laid.rows, laid.lengths).astype(int)
    assert sorted((size - used).tolist()) == rooms_left(laid.lengths.tolist(), size)
    assert laid.cut == 0 and laid.long == sum(n > size for n in documents)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(8, 50), st.sampled_from([best_fit, concatenate]))
def test_pieces_cover_every_document_and_overlap_by_one(documents: list[int], size: int, strategy: Any) -> None:
    laid: Cut = strategy(np.array(documents), size)
    assert (np.diff(laid.rows) >= 0).all() and np.bincount(laid.rows, laid.lengths).max() <= size
    pieces = sorted(zip(laid.starts.tolist(), laid.lengths.tolist(), strict=True))
    start, cut = 0, 0
    for length in documents:
        end, at, count = start + length, start, 0
        while at < end:
            first, taken = pieces.pop(0)
            assert first == (at if at == start else at - 1) and taken >= 2
            at, count = first + taken, count + 1
        assert at == end, "no piece reaches into the next document"
        cut += count > 1 and length <= size
        start = end
    assert not pieces and laid.cut == cut


def test_concatenation_leaves_at_most_one_place_free_in_a_row() -> None:
    laid = concatenate(np.random.default_rng(0).integers(3, 200, 300), 64)
    assert np.bincount(laid.rows, laid.lengths)[:-1].min() >= 63


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe([d.text for d in corpus(1, 40)], 600), folder)
    return Artifact(folder)


def documents(seed: int = 0, count: int = 120) -> list[Document]:
    rng = random.Random(seed)
    words = " ".join(d.text for d in corpus(seed, 20)).split(" ")
    return [Document(" ".join(rng.choices(words, k=rng.randint(1, 40))), f"d{i}") for i in range(count)]


def in_groups(folder: Path, records: list[Document], size: int = 25) -> Artifact:
    """The records in several shards, so that there is work for several processes."""
    with ShardWriter(folder, "documents", size) as writer:
        for record in records:
            writer.write(record)
    return Artifact(folder)


def packed(run: Runner, data: Artifact, tokenizer: Artifact, work: str = "", workers: int = 1, **keys: Any) -> Tokens:
    stage = Pack(data=["a"], tokenizer="t", **{"seq_len": 64, "shard": 3000, **keys})
    return run(stage, {"a": data, "t": tokenizer}, work=work, workers=workers)


def every_row(rows: TokenRows) -> Batch:
    """All rows as one batch, in the order in which they lie."""
    from fledge.data.tokens.rows import as_batch

    return as_batch(*rows.read(np.arange(len(rows))))


@pytest.mark.parametrize("strategy", ["best_fit", "concatenate"])
def test_every_token_of_every_document_is_a_target_once(
    tmp_path: Path, run: Runner, tokenizer: Artifact, strategy: str
) -> None:
    some = documents()
    made = packed(run, in_groups(tmp_path / "a", some), tokenizer, strategy=strategy)
    rows = TokenRows.open(made.path)
    rows.verify()
    separator = rows.index["separator"]
    ids = list(encode_plain(packer.load(tokenizer.path), [d.text for d in some]))
    labels = every_row(rows).labels
    assert Counter(labels[labels != IGNORED].tolist()) == Counter(t for one in ids for t in (*one, separator))
    assert made.metrics["documents"] == len(some) and made.metrics["tokens"] == rows.index["tokens"]
    assert made.metrics["bytes"] == sum(len(d.text.encode()) for d in some)
    assert made.metrics["shards"] > 1 and rows.index["dtype"] == "<u2"
    assert made.metrics["fill"] == pytest.approx(made.metrics["tokens"] / rows.tokens_held)
    whole = [
        tuple(piece[1:-1]) for n in range(len(rows)) for piece in rows.pieces(n) if piece[0] == separator == piece[-1]
    ]
    fitting = Counter(tuple(one) for one in ids if len(one) + 2 <= 64)
    if strategy == "best_fit":
        assert Counter(whole) == fitting, "only what is longer than a row is cut"
        assert made.metrics["documents_cut"] == 0
    else:
        assert made.metrics["documents_cut"] == fitting.total() - len(whole) > 0


def test_positions_restart_with_every_piece_and_fillings_teach_nothing(
    tmp_path: Path, run: Runner, tokenizer: Artifact
) -> None:
    rows = TokenRows.open(packed(run, in_groups(tmp_path / "a", documents()), tokenizer).path)
    batch = every_row(rows)
    for number in range(len(rows)):
        ids, positions, labels = batch.input_ids[number], batch.position_ids[number], batch.labels[number]
        at = 0
        for piece in rows.pieces(number):
            there = slice(at, at + len(piece))
            assert ids[there].tolist() == piece.tolist() and positions[there].tolist() == list(range(len(piece)))
            assert labels[there].tolist() == [IGNORED, *piece[1:].tolist()]
            at += len(piece)
        assert (ids[at:] == rows.index["separator"]).all() and not positions[at:].any()
        assert (labels[at:] == IGNORED).all()


def test_the_same_bytes_from_two_processes_and_after_a_kill(
    tmp_path: Path, run: Runner, tokenizer: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = in_groups(tmp_path / "a", documents())
    expected = digests(packed(run, data, tokenizer).path)
    assert digests(packed(run, data, tokenizer, workers=2).path) == expected
    for name, after in (("encode", 2), ("pack_shard", 1)):
        calls = []
        original = getattr(packer, name)

        def dies(work: Any, original: Any = original, calls: list[int] = calls, after: int = after) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(work)

        with monkeypatch.context() as patch:
            patch.setattr(packer, name, dies)
            with pytest.raises(KeyboardInterrupt):
                packed(run, data, tokenizer, work=f"killed-{name}")
        assert digests(packed(run, data, tokenizer, work=f"killed-{name}").path) == expected


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    (tmp_path / "ids").mkdir()
    np.array([0, 70_000, 5, 0], dtype="<u4").tofile(tmp_path / "ids/ids.bin")
    np.array([4], dtype="<u4").tofile(tmp_path / "ids/lengths.bin")
    pack_shard(Packing((tmp_path / "ids",), 8, "best_fit", "<u4", 0, tmp_path / "shard"))
    written = np.fromfile(tmp_path / "shard/rows.bin", dtype="<u4")
    assert written.tolist() == [0, 70_000, 5, 0, 0, 0, 0, 0]
    assert (tmp_path / "shard/rows.begins").read_bytes() == bytes([0b11110001])


def test_damage_is_seen(tmp_path: Path, run: Runner, tokenizer: Artifact) -> None:
    folder = packed(run, in_groups(tmp_path / "a", documents()), tokenizer).path
    file = folder / "tokens/part-00001.bin"
    whole = file.read_bytes()
    file.unlink()  # it shares its bytes with the work folder
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(FledgeError, match=r"damaged") as caught:
        TokenRows.open(folder).verify()
    assert "part-00001.bin" in str(caught.value)
    file.write_bytes(whole[:-2])
    with pytest.raises(FledgeError, match="cut short"):
        TokenRows.open(folder)
    (folder / "index.json").unlink()
    with pytest.raises(FledgeError, match="no folder of packed tokens"):
        TokenRows.open(folder)
    assert Tokens.problem_with(folder)


def test_conversations_are_read_as_text_and_other_kinds_refused(
    tmp_path: Path, run: Runner, tokenizer: Artifact
) -> None:
    data = write(tmp_path / "a", [talk("hello there", "你好")])
    rows = TokenRows.open(packed(run, data, tokenizer).path)
    (piece,) = rows.pieces(0)
    assert packer.load(tokenizer.path).decode(piece[1:-1].tolist()) == "hello there\n你好"
    with pytest.raises(FledgeError, match="only documents and conversations"):
        packed(run, write(tmp_path / "b", [Labelled("text", "label")]), tokenizer)
    with pytest.raises(FledgeError, match="no text"):
        packed(run, write(tmp_path / "c", [Document("")]), tokenizer)


# --- reading ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_a_shuffle_is_an_order_of_all_places(n: int, seed: int, epoch: int) -> None:
    shuffle = Shuffle(n, seed, epoch)
    order = shuffle(np.arange(n))
    assert sorted(order.tolist()) == list(range(n))
    some = random.Random(seed).sample(range(n), min(n, 9))
    assert shuffle(np.array(some)).tolist() == order[some].tolist(), "place by place"


def test_shuffles_differ_mix_well_and_outlive_releases() -> None:
    orders = [Shuffle(10_000, *seeds)(np.arange(10_000)) for seeds in ((1, 0), (1, 1), (2, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).sum() < 20
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05, "neighbours are strangers"
    assert Shuffle(10, 42, 0)(np.arange(10)).tolist() == [2, 6, 5, 3, 0, 1, 7, 4, 9, 8], (
        "pinned: a run may go on under a later release"
    )
    big = Shuffle(2**50, 7)(np.array([0, 2**50 - 1]))
    assert len(set(big.tolist())) == 2 and (big < 2**50).all()


@pytest.fixture
def rows(tmp_path: Path, run: Runner, tokenizer: Artifact) -> TokenRows:
    return TokenRows.open(packed(run, in_groups(tmp_path / "a", documents()), tokenizer).path)


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "labels", "position_ids"))


def test_each_row_once_an_epoch_and_each_epoch_anew(rows: TokenRows) -> None:
    source = RowBatches(rows, 4, seed=3)
    first, second = source.numbers(0, len(rows)), source.numbers(len(rows), 2 * len(rows))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(len(rows)))
    assert first.tolist() != second.tolist()
    assert not np.array_equal(first, RowBatches(rows, 4, seed=4).numbers(0, len(rows)))
    assert len(source) == -(-len(rows) // 4)


def test_a_run_goes_on_at_any_step_with_any_batch_on_any_number_of_processes(rows: TokenRows) -> None:
    whole = RowBatches(rows, 6, seed=3)
    steps = [whole.batch(step) for step in range(2 * len(whole))]
    for step in random.Random(0).sample(range(len(steps)), 6):
        assert equal(RowBatches(rows, 6, seed=3).batch(step), steps[step])
        parts = [RowBatches(rows, 6, 3, rank=rank, world=4).batch(step) for rank in range(4)]
        assert np.array_equal(np.concatenate([part.input_ids for part in parts]), steps[step].input_ids)
    ids = np.concatenate([batch.input_ids for batch in steps])
    after = RowBatches(rows, 5, seed=3, first=7 * 6)  # seven batches of six rows are behind
    assert np.array_equal(np.concatenate([after.batch(s).input_ids for s in range(6)]), ids[42:72])
    with pytest.raises(ValueError, match="every process"):
        RowBatches(rows, 3, 0, rank=0, world=4)


def test_the_stream_goes_on_at_any_token(rows: TokenRows) -> None:
    source = RowBatches(rows, 1, seed=3)
    stream = np.concatenate([source.batch(step).input_ids[0] for step in range(len(rows) + 3)])
    for token in (0, 1, 63, 64, 1000, len(rows) * 64 - 1, len(rows) * 64 + 70):
        pieces = source.tokens_from(token)
        found = np.concatenate([next(pieces) for _ in range(3)])[:100]
        assert np.array_equal(found, stream[token : token + len(found)][: len(found)])


def test_prefetching_changes_nothing(rows: TokenRows) -> None:
    plain = RowBatches(rows, 4, seed=1)
    with Prefetched(RowBatches(rows, 4, seed=1), ahead=3) as source:
        assert len(source) == len(plain)
        for step in (0, 1, 2, 9, 10, 3, 3, 50):
            assert equal(source.batch(step), plain.batch(step))


def test_what_a_batch_costs_does_not_grow_with_the_corpus() -> None:
    """The order is computed: a shuffle of 2⁵⁰ places holds two numbers and six keys."""
    assert sum(np.asarray(value).nbytes for value in vars(Shuffle(2**50, 1)).values()) < 200


def test_pretraining_reads_packed_rows(tmp_path: Path, run: Runner, tokenizer: Artifact) -> None:
    from fledge.models.shape import ModelShape
    from fledge.training.stages import Pretrain

    made = packed(run, in_groups(tmp_path / "a", documents()), tokenizer)
    keys = {"tokenizer": "t", "model": ModelShape(hidden=16, layers=1, head_dim=8), "tokens": 2048, "data": "p"}
    stage = Pretrain(**keys, seq_len=64, train={"batch_size": 8, "dtype": "float32"})
    model = run(stage, {"p": Tokens(made.path), "t": tokenizer}, compile="off", threads=1)
    assert model.metrics["corpus_tokens"] == made.metrics["tokens"]
    assert model.metrics["text_bytes"] == made.metrics["bytes"] and model.metrics["steps"] == 4
    assert model.metrics["epochs"] == 32 / made.metrics["rows"]
    assert 0 < model.metrics["final_loss"] < 10
    with pytest.raises(FledgeError, match="another length"):
        run(Pretrain(**keys, seq_len=32), {"p": Tokens(made.path), "t": tokenizer})
    other = tmp_path / "other"
    save_tokenizer(train_bpe(["other text"], 300), other)
    with pytest.raises(FledgeError, match="another tokenizer"):
        run(stage, {"p": Tokens(made.path), "t": Artifact(other)})
