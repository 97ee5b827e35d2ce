"""Mixtures: exact sizes, the shares asked for at every moment, the same bytes however they are made."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.core.artifact import Artifact, Conversations, Documents
from fledge.core.errors import FledgeError
from fledge.core.recipe import from_values
from fledge.data.mixing import mixer
from fledge.data.mixing.curriculum import buckets_of
from fledge.data.mixing.shares import PRESETS, Wish, amounts, choose, weights_by_genre
from fledge.data.tokens.packing import encode_plain
from fledge.data.tokens.stages import Mix
from fledge.data.tokens.tokenizer import save_tokenizer, train_bpe
from fledge.records.kinds import Document, Labelled
from fledge.records.shards import ShardWriter, read

from .conftest import Runner, corpus, digests, talk, write

SIZES = st.lists(st.integers(1, 10**12), min_size=1, max_size=6)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 10**13), st.floats(0.3, 10))
def test_amounts_are_the_budget_to_the_last_unit_in_proportion_to_size_to_the_one_over_t(
    sizes: list[int], budget: int, temperature: float
) -> None:
    made = amounts({str(i): Wish(size) for i, size in enumerate(sizes)}, budget, temperature)
    assert sum(made.values()) == budget
    powers = [size ** (1 / temperature) for size in sizes]
    for i, power in enumerate(powers):
        assert made[str(i)] == pytest.approx(budget * power / sum(powers), rel=1e-9, abs=1.0)


def test_epochs_come_first_and_weights_divide_what_is_left() -> None:
    wishes = {"a": Wish(100, epochs=2.5), "b": Wish(1000, weight=3), "c": Wish(1000, weight=1)}
    assert amounts(wishes, 650) == {"a": 250, "b": 300, "c": 100}
    with pytest.raises(FledgeError, match="no room"):
        amounts(wishes, 250)
    with pytest.raises(FledgeError, match="no source with a weight"):
        amounts({"a": Wish(100, epochs=1)}, 500)


def test_without_a_budget_nothing_weighted_is_read_twice_and_something_is_used_up() -> None:
    wishes = {"a": Wish(100, weight=1), "b": Wish(1000, weight=2), "c": Wish(10, epochs=3)}
    assert amounts(wishes, None) == {"a": 100, "b": 200, "c": 30}
    assert amounts(wishes, None, most_epochs=4) == {"a": 400, "b": 800, "c": 30}


def test_what_a_source_cannot_give_goes_to_the_others() -> None:
    wishes = {"a": Wish(10, weight=1), "b": Wish(100, weight=1), "c": Wish(1000, weight=1)}
    assert amounts(wishes, 600, most_epochs=1) == {"a": 10, "b": 100, "c": 490}
    assert amounts(wishes, 10_000, most_epochs=2) == {"a": 20, "b": 200, "c": 2000}, "below the budget: none has more"


def test_presets_share_a_genres_weight_by_size() -> None:
    weights = weights_by_genre("llama", {"cc": "web", "c4": "web", "git": "code"}, {"cc": 300, "c4": 100, "git": 7})
    assert weights == {"cc": pytest.approx(0.615), "c4": pytest.approx(0.205), "git": pytest.approx(0.045)}
    for preset in PRESETS.values():
        assert sum(preset.values()) == pytest.approx(1, abs=0.011)  # GPT-3's table adds up to 101%


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 2000), st.integers(0, 2**60))
def test_whole_passes_then_a_part_into_which_nothing_more_fits(sizes: list[int], amount: int, seed: int) -> None:
    lengths, hashes = np.array(sizes), np.random.default_rng(1).integers(0, 2**64, len(sizes), dtype=np.uint64)
    made = choose(lengths, hashes, amount, seed)
    taken, total = Counter(made.rows.tolist()), sum(sizes)
    assert all(sizes[row] for row in taken), "empty texts are never taken"
    left = amount - int(lengths[made.rows].sum())
    assert left >= 0
    if total:
        passes = amount // total
        assert {taken[row] for row in range(len(sizes)) if sizes[row]} <= {passes, passes + 1}
        assert all(sizes[row] > left for row in range(len(sizes)) if sizes[row] and taken[row] == passes)
        assert ((made.times >= 0) & (made.times < 1)).all()
        for epoch in range(passes):
            assert made.times[made.epochs == epoch].max() <= made.times[made.epochs > epoch].min(initial=1)


def test_a_text_is_chosen_by_its_hash_and_a_larger_amount_holds_a_smaller_one() -> None:
    rng = np.random.default_rng(0)
    sizes, hashes = rng.integers(50, 150, 500), rng.integers(0, 2**64, 500, dtype=np.uint64)
    chosen = [set(hashes[choose(sizes, hashes, n, 7).rows].tolist()) for n in (5_000, 20_000)]
    assert len(chosen[0] - chosen[1]) <= 2 and 40 < len(chosen[0]) < 60
    order = rng.permutation(500)
    assert set(hashes[order][choose(sizes[order], hashes[order], 20_000, 7).rows].tolist()) == chosen[1]
    assert len(chosen[1] & set(hashes[choose(sizes, hashes, 20_000, 8).rows].tolist())) < 120, "by the seed, too"


def test_buckets_rank_within_each_group_and_are_of_equal_size() -> None:
    rng = np.random.default_rng(0)
    scores, sizes, groups = rng.normal(size=4000), rng.integers(1, 100, 4000), rng.integers(0, 2, 4000)
    scores[groups == 1] += 100  # another language, whose scores do not compare
    for falling in (False, True):
        buckets = buckets_of(scores, sizes, groups, np.arange(4000, dtype=np.uint64), 5, falling)
        for group in (0, 1):
            for low, high in ((b, b + 1) for b in range(4)):
                a, b = (scores[(groups == group) & (buckets == n)] for n in (low, high))
                assert (b.max() <= a.min()) if falling else (a.max() <= b.min())
            held = [sizes[(groups == group) & (buckets == n)].sum() for n in range(5)]
            assert max(held) - min(held) <= 200


# --- the stage -------------------------------------------------------------------------------------------------------


def source(folder: Path, seed: int, count: int, **fields: Any) -> Artifact:
    """Documents in shards of 30, so that there is work for several processes."""
    with ShardWriter(folder, "documents", 30) as writer:
        for number, row in enumerate(corpus(seed, count)):
            writer.write(Document(row.text, f"{folder.name}-{number}", row.language, "the web", fields))
    return Artifact(folder)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Artifact]:
    return {"a": source(tmp_path / "a", 1, 100), "b": source(tmp_path / "b", 2, 60), "c": source(tmp_path / "c", 3, 20)}


def size(rows: list[Any]) -> int:
    return sum(len(row.text.encode()) for row in rows)


def test_a_mixture_has_its_size_its_shares_throughout_and_says_where_texts_are_from(
    data: dict[str, Artifact], run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixer, "_BUCKET", 40_000)  # several buckets
    sources = {
        "a": {"data": "a", "weight": 3}, "b": {"data": "b", "weight": 1}, "c": {"data": "c", "epochs": 3},
    }  # fmt: skip
    stage = Mix(sources=sources, bytes=330_000)
    made = run(stage, data)
    assert isinstance(made, Documents)
    rows = list(read(made, "documents"))
    available = {name: size(list(read(data[name], "documents"))) for name in data}
    table = made.metrics["sources"]
    wanted = {"c": 3 * available["c"], "a": 0.75 * (330_000 - 3 * available["c"])}
    wanted["b"] = wanted["a"] / 3
    for name, entry in table.items():
        mine = [row for row in rows if row.source == name]
        assert (entry["rows"], entry["bytes"]) == (len(mine), size(mine))
        assert entry["available_bytes"] == available[name]
        assert wanted[name] - 2500 < size(mine) <= wanted[name] + 1
        half = [row for row in rows[: len(rows) // 2] if row.source == name]
        assert 0.3 < len(half) / len(mine) < 0.7, "mixed throughout"
    assert made.metrics["bytes"] == size(rows) == 330_000 - made.metrics["below_budget"]
    copies = Counter(row.id for row in rows if row.source == "c")
    assert set(copies.values()) == {3} and table["c"]["most_often"] == 3 and table["c"]["epochs"] == 3
    epochs = [int(row.meta.get("epoch", "1")) for row in rows if row.source == "c"]
    assert epochs == sorted(epochs) and Counter(epochs) == {1: 20, 2: 20, 3: 20}, "one pass after the other"
    assert all(row.meta["origin"] == "the web" for row in rows)
    originals = {row.id: row.text for name in data for row in read(data[name], "documents")}
    assert all(originals[row.id] == row.text for row in rows)


def test_the_same_bytes_from_two_processes_and_after_kills(
    data: dict[str, Artifact], run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Mix(sources={"a": "a", "b": "b", "c": "c"}, bytes=500_000, temperature=2)
    expected = digests(run(stage, data).path)
    assert digests(run(stage, data, workers=2).path) == expected
    assert digests(run(stage, data, seed=1).path) != expected
    for name, after in (("measure", 3), ("send", 2)):
        original, calls = getattr(mixer, name), []

        def dies(work: Any, original: Any = original, calls: list[int] = calls, after: int = after) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(work)

        with monkeypatch.context() as patch:
            patch.setattr(mixer, name, dies)
            with pytest.raises(KeyboardInterrupt):
                run(stage, data, work=f"killed-{name}")
        assert digests(run(stage, data, work=f"killed-{name}").path) == expected


def test_the_size_of_buckets_changes_nothing(
    data: dict[str, Artifact], run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Mix(sources={"a": "a", "b": "b"})
    expected = [row.id for row in read(run(stage, data), "documents")]
    monkeypatch.setattr(mixer, "_BUCKET", 10_000)
    assert [row.id for row in read(run(stage, data), "documents")] == expected
    assert sorted(expected) == sorted(row.id for name in "ab" for row in read(data[name], "documents"))


def test_sizes_in_tokens(data: dict[str, Artifact], run: Runner, tmp_path: Path) -> None:
    tokenizer = train_bpe([row.text for row in corpus(1, 30)], 500)
    save_tokenizer(tokenizer, tmp_path / "t")
    made = run(Mix(sources={"a": "a", "b": "b"}, tokens="20k", tokenizer="t"), {**data, "t": Artifact(tmp_path / "t")})
    counted = sum(map(len, encode_plain(tokenizer, [row.text for row in read(made, "documents")])))
    assert made.metrics["tokens"] == counted and 19_000 < counted <= 20_000


def test_a_curriculum_rises_within_each_source_and_language(data: dict[str, Artifact], run: Runner) -> None:
    made = run(Mix(sources={"a": "a", "b": "b"}, curriculum={"by": "length", "buckets": 4}), data)
    rows = list(read(made, "documents"))
    for name in ("a", "b"):
        for language in ("en", "zh"):
            lengths = [size([row]) for row in rows if (row.source, row.language) == (name, language)]
            n = len(lengths) // 4
            assert np.mean(lengths[:n]) < np.mean(lengths[n : 2 * n]) < np.mean(lengths[-n:])
            assert max(lengths[: n - 2]) <= min(lengths[-n + 2 :])
            assert lengths != sorted(lengths), "random inside a bucket"
    shares = [sum(row.source == "a" for row in part) / len(part) for part in (rows[:80], rows[80:])]
    assert abs(shares[0] - shares[1]) < 0.15, "the mixture stays the same"


def test_a_curriculum_by_a_number_in_meta_needs_it(tmp_path: Path, run: Runner) -> None:
    rng = random.Random(0)
    rows = [Document(f"text {i}", f"{i}", meta={"perplexity": str(rng.random() * 900)}) for i in range(50)]
    stage = Mix(sources={"a": "a"}, curriculum={"by": "perplexity", "order": "falling", "buckets": 50})
    made = run(stage, {"a": write(tmp_path / "a", rows)})
    scores = [float(row.meta["perplexity"]) for row in read(made, "documents")]
    assert scores[0] > 800 and np.corrcoef(scores, range(50))[0, 1] < -0.98
    with pytest.raises(FledgeError, match=r'1 records of "a" have no number called perplexity'):
        run(stage, {"a": write(tmp_path / "b", [*rows, Document("more", meta={"perplexity": "high"})])})


def test_presets_and_tiers_weigh(data: dict[str, Artifact], run: Runner) -> None:
    stage = Mix(
        sources={
            "a": {"data": "a", "genre": "web", "tier": "human"}, "b": {"data": "b", "genre": "books", "tier": "web"},
        },
        preset="llama", tiers={"human": 2, "synthetic": 1, "web": 1}, bytes=100_000, max_epochs=1,
    )  # fmt: skip
    table = run(stage, data).metrics["sources"]
    assert table["a"]["bytes"] / table["b"]["bytes"] == pytest.approx(2 * 0.82 / 0.045, rel=0.5)


def test_many_repeats_are_told(data: dict[str, Artifact], run: Runner) -> None:
    run(Mix(sources={"c": {"data": "c", "epochs": 4}}), data)
    assert not [e for e in run.events if e.kind == "message"]
    run(Mix(sources={"c": {"data": "c", "epochs": 5}}), data)
    (message,) = (event for event in run.events if event.kind == "message")
    assert "5.0 times" in str(message)


def test_conversations_mix_with_conversations_and_become_text_beside_documents(tmp_path: Path, run: Runner) -> None:
    chats = write(tmp_path / "chats", [talk("hello", "hi", id="x"), talk("how are you?", "well", id="y")])
    texts = write(tmp_path / "texts", [Document("a text", "z")])
    alone = run(Mix(sources={"chats": "a"}), {"a": chats})
    assert isinstance(alone, Conversations) and {r.id for r in read(alone, "conversations")} == {"x", "y"}
    both = run(
        Mix(sources={"chats": {"data": "a", "epochs": 1}, "texts": {"data": "b", "epochs": 1}}),
        {"a": chats, "b": texts},
    )
    assert {(row.text, row.source) for row in read(both, "documents")} == {
        ("hello\nhi", "chats"), ("how are you?\nwell", "chats"), ("a text", "texts"),
    }  # fmt: skip
    labels = write(tmp_path / "labels", [Labelled("text", "label")])
    with pytest.raises(FledgeError, match="of one kind"):
        run(Mix(sources={"a": "a", "b": "b"}), {"a": texts, "b": labels})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokens": "1M"}, "needs a tokenizer"),
        ({"sources": {"a": {"data": "x", "weight": 1, "epochs": 1}}}, "not both"),
        ({"sources": {"a": {"data": "x", "weight": 1}, "b": {"data": "x"}}}, "either every source"),
        ({"sources": {"a": {"data": "x"}}, "preset": "llama"}, "no weight for these"),
        ({"sources": {"a": {"data": "x", "genre": "news"}}, "preset": "gpt3"}, "genre: books, reference, web"),
        ({"sources": {"a.b": "x"}}, "letters, digits"),
        ({"sources": {}}, "at least 1"),
        ({"tiers": {"human": 2}}, "every tier"),
        ({"sources": {"a": {"data": "x", "wieght": 1}}}, "weight"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    (tmp_path / "x.txt").write_text("text")
    block = {"use": "data.mix", "sources": {"a": "x"}, **keys}
    for name, value in block["sources"].items():
        if isinstance(value, str):
            block["sources"][name] = {"data": value}
        block["sources"][name]["data"] = str(tmp_path / "x.txt")
    with pytest.raises(FledgeError, match=said):
        from_values({"name": "x", "stages": {"m": block}})


def test_raw_files_will_do_and_what_cannot_be_read_of_them_is_kept(tmp_path: Path, run: Runner) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nnot JSON\n{"text": "three"}\n')
    made = run(Mix(sources={"x": {"data": "x", "epochs": 1}}), {"x": Artifact(tmp_path / "x.jsonl")})
    assert sorted(row.text for row in read(made, "documents")) == ["one", "three", "two"]
    assert sum(n for reasons in made.metrics["rejected"].values() for n in reasons.values()) == 1
    assert list((made.path / "rejected").glob("*.parquet"))
