"""Exact and near duplicates: against counting by hand, and whatever the order."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fledge.data.near_duplicates import MinHash, clusters, ranking
from fledge.data.ngrams import jaccard, shingles, unit_hashes
from fledge.data.steps import ExactDedup, NearDedup, Rejected
from fledge.data.texts import units
from fledge.records.kinds import Document, Labelled, Record

from .conftest import chinese, english, talk, through


def variant(text: str, share: float, rng: random.Random) -> str:
    """The text with some of its words (characters of Chinese) replaced."""
    parts = text.split(" ") if " " in text else list(text)
    for i in range(len(parts)):
        if rng.random() < share:
            parts[i] = rng.choice(["zebra", "quartz", "violin"]) if " " in text else rng.choice("鼎鼐龟麟凰")
    return (" " if " " in text else "").join(parts)


def brute_jaccard(a: str, b: str, n: int = 5) -> float:
    """Of sets of tuples of units, no hashing."""
    sets = [{tuple(u[i : i + n]) for i in range(len(u) - n + 1)} for u in (units(a), units(b))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_jaccard_of_hashes_is_that_of_the_sets() -> None:
    rng = random.Random(0)
    for make in (english, chinese):
        text = make(rng)
        for share in (0.0, 0.02, 0.1, 0.5):
            other = variant(text, share, rng)
            ours = jaccard(shingles(unit_hashes(units(text)), 5), shingles(unit_hashes(units(other)), 5))
            assert ours == pytest.approx(brute_jaccard(text, other))


def test_signatures_estimate_jaccard_similarity() -> None:
    """The share of agreeing places has standard deviation √(s(1 - s) / K)."""
    rng = random.Random(1)
    minhash = MinHash(bands=64, rows=8)
    for make in (english, chinese):
        for share in (0.01, 0.03, 0.08):
            text = make(rng, 30)
            other = variant(text, share, rng)
            a, b = minhash.signature(text), minhash.signature(other)
            assert a is not None and b is not None
            true = brute_jaccard(text, other)
            assert abs(float((a == b).mean()) - true) < 4 * (true * (1 - true) / 512) ** 0.5 + 1e-9


def test_the_hash_functions_are_what_they_say() -> None:
    """x ↦ (a·x + b) mod 2⁶⁴ >> 32, recomputed with Python's integers."""
    minhash = MinHash(seed=7)
    grams = shingles(unit_hashes(units(english(random.Random(3)))), 5)
    signature = minhash.of(grams)
    assert signature is not None
    for k in (0, 55, 111):
        a, b = int(minhash._a[k, 0]), int(minhash._b[k, 0])
        assert int(signature[k]) == min((a * int(x) + b) % 2**64 >> 32 for x in grams)
        assert a % 2 == 1


def test_pairs_above_the_threshold_are_found_and_pairs_below_are_not() -> None:
    rng = random.Random(4)
    texts, near, far = [], [], []
    for i in range(60):
        text = (english if i % 2 else chinese)(rng, 20)
        other = variant(text, rng.choice([0.005, 0.01, 0.2, 0.4]), rng)
        similarity = brute_jaccard(text, other)
        (near if similarity > 0.85 else far if similarity < 0.45 else []).append((len(texts), len(texts) + 1))
        texts += [text, other]
    minhash = MinHash()
    signatures = np.stack([s for text in texts if (s := minhash.signature(text)) is not None])
    leaders = clusters(minhash, signatures, ranking([(len(t), str(i)) for i, t in enumerate(texts)]), 0.7)
    assert len(near) > 15 and len(far) > 15
    assert all(leaders[a] == leaders[b] for a, b in near)
    assert all(leaders[a] != leaders[b] for a, b in far)


def test_meeting_in_a_band_is_not_enough() -> None:
    rng = random.Random(11)
    texts = [english(rng, 20)]
    texts.append(variant(texts[0], 0.01, rng))
    minhash = MinHash()
    signatures = np.stack([s for text in texts if (s := minhash.signature(text)) is not None])
    keys = minhash.bands_of(signatures)
    agreement = float((signatures[0] == signatures[1]).mean())
    assert (keys[0] == keys[1]).any() and 0.7 < agreement < 1
    ranks = ranking([(len(text), "") for text in texts])
    for threshold, joined in ((agreement - 0.01, True), (agreement + 0.01, False)):
        leaders = clusters(minhash, signatures, ranks, threshold)
        assert bool(leaders[0] == leaders[1]) is joined


def family(seed: int, copies: int) -> list[Record]:
    """Texts with near copies of them, longer and shorter."""
    rng = random.Random(seed)
    records: list[Record] = []
    for i in range(12):
        text = (english if i % 2 else chinese)(rng, 25)
        records.append(Document(text, f"t{i}"))
        for j in range(copies):
            extra = " Indeed." * (j + 1) if i % 2 else "确实。" * (j + 1)
            records.append(Document(text + extra, f"t{i}c{j}"))
    return records


@pytest.mark.parametrize("step", [ExactDedup(), NearDedup()])
def test_the_kept_texts_do_not_depend_on_the_order(step: ExactDedup | NearDedup) -> None:
    records = [*family(5, 3), Document("Same text", "b"), Document("same  TEXT!", "a"), Document("same text", "0")]
    kept = set()
    for seed in range(6):
        order = random.Random(seed).sample(records, len(records))
        kept.add(frozenset(row.id for row in through(step, order) if not isinstance(row, Rejected)))
    assert len(kept) == 1


def test_of_near_copies_the_longest_stays_and_the_others_name_it() -> None:
    records = family(6, 2)
    rows = through(NearDedup(), records)
    kept = {row.id for row in rows if not isinstance(row, Rejected)}
    assert kept == {f"t{i}c1" for i in range(12)}
    assert {row.value for row in rows if isinstance(row, Rejected)} == kept


def test_exact_duplicates_ignore_case_spaces_and_width_but_not_labels() -> None:
    plain = [
        Document("Hello, World", "b"), Document("hello world!!", "a"), Document("ＨＥＬＬＯ world", "c"),
        Document("？", "q1"), Document("！", "q2"),
    ]  # fmt: skip
    labelled = [
        Labelled("hello world", "x", "l1"), Labelled("hello world", "y", "l2"), Labelled("Hello world", "x", "l0")
    ]  # fmt: skip
    for records, expected in ((plain, {"b": "a", "c": "a"}), (labelled, {"l1": "l0"})):
        rows = through(ExactDedup(), records)
        assert {
            record.id: row.value for record, row in zip(records, rows, strict=True) if isinstance(row, Rejected)
        } == expected


def test_a_dialogue_is_compared_whole() -> None:
    rng = random.Random(8)
    turns = [english(rng, 3) for _ in range(6)]
    same_start = [*turns[:2], *(english(rng, 3) for _ in range(4))]
    copy = [*turns[:5], turns[5] + " Bye."]
    records = [talk(*turns, id="a"), talk(*same_start, id="b"), talk(*copy, id="c")]
    refused = [isinstance(row, Rejected) for row in through(NearDedup(), records)]
    assert refused == [True, False, False], "the longer copy stays, the other dialogue too"


def test_texts_without_a_word_are_no_near_duplicates() -> None:
    rows = [Document("!!", "a"), Document("!!!", "b")]
    assert through(NearDedup(), rows) == rows
