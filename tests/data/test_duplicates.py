"""Exact and near duplicates: against counting by hand, and whatever the order."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from fledge.data.chunk import Chunk
from fledge.data.dedup.buckets import Buckets
from fledge.data.dedup.corpora import components
from fledge.data.dedup.minhash import MinHash, fixed_width
from fledge.data.dedup.simhash import simhashes
from fledge.data.dedup.units import Units, hash_each, positions
from fledge.data.ngrams import jaccard, shingles, unit_hashes
from fledge.data.passes import write_table
from fledge.data.steps import CorpusStep, ExactDedup, NearDedup, Rejected, SimHashDedup, Sketches
from fledge.data.texts import units
from fledge.records.kinds import Document, Labelled, Record, kind_of

from .conftest import chinese, english, talk, through


def name_of(id: str) -> int:
    """By which equally long texts are ranked."""
    return int(hash_each([id])[0])


def variant(text: str, share: float, rng: random.Random) -> str:
    """The text with some of its words (characters of Chinese) replaced."""
    parts = text.split(" ") if " " in text else list(text)
    for i in range(len(parts)):
        if rng.random() < share:
            parts[i] = rng.choice(["zebra", "quartz", "violin"]) if " " in text else rng.choice("鼎鼐龟麟凰")
    return (" " if " " in text else "").join(parts)


def brute_grams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """Tuples of units, no hashing."""
    u = units(text)
    return {tuple(u[i : i + n]) for i in range(len(u) - n + 1)}


def brute_jaccard(a: str, b: str, n: int = 5) -> float:
    sets = [brute_grams(a, n), brute_grams(b, n)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def strange(rng: random.Random) -> str:
    """Texts that Unicode makes hard: combining marks, ligatures, ß, half-width kana, Hangul in pieces, Thai."""
    pick = rng.randrange(4)
    if pick == 0:
        return "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(60)))
    if pick == 1:
        marks = "abc ABC ßéÉ e\u0301 ﬁ 中文，。①½㍿ ｶﾞ か\u3099 각\u1100\u1161\u11a8_-' İſ Σς ไทย ㇰ𠀀豈〇\u212a"
        marks += "𳎯 Ⓐ\u0345"
        return "".join(rng.choice(marks) for _ in range(rng.randrange(40)))
    if pick == 2:
        points = (rng.randrange(0x40000) for _ in range(rng.randrange(60)))
        return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    return "".join(rng.choice("中文人民法院，。 abcdefghijklmnopqr XYZ") for _ in range(rng.randrange(200)))


def test_units_found_by_table_are_those_found_by_expression() -> None:
    rng = random.Random(0)
    number_of: dict[str, int] = {}
    for _ in range(60):
        texts = [strange(rng) for _ in range(50)]
        found = Units.of(texts)
        for i, text in enumerate(texts):
            hashes = found.hashes[found.bounds[i] : found.bounds[i + 1]].tolist()
            said = units(text)
            assert len(hashes) == len(said) == len(positions(text))
            for unit, number in zip(said, hashes, strict=True):
                assert number_of.setdefault(unit, number) == number, "equal units have equal hashes"
    assert len(set(number_of.values())) == len(number_of) > 20_000, "different units different ones"
    for text in (english(rng), chinese(rng), "ＨＥＬＬＯ, World — 第①条，3.5km"):
        assert [units(text[start:end]) for start, end in positions(text)] == [[unit] for unit in units(text)]


def test_units_of_one_character_are_marked_where_scripts_are_unspaced() -> None:
    found = Units.of(["I saw 三只猫 x", "", "ねこ"])
    assert found.unspaced.tolist() == [False, False, True, True, True, False, True, True]
    assert found.bounds.tolist() == [0, 6, 6, 8]


def test_jaccard_of_hashes_is_that_of_the_sets() -> None:
    rng = random.Random(0)
    for make in (english, chinese):
        text = make(rng)
        for share in (0.0, 0.02, 0.1, 0.5):
            other = variant(text, share, rng)
            ours = jaccard(shingles(unit_hashes(units(text)), 5), shingles(unit_hashes(units(other)), 5))
            grams, bounds = Units.of([text, other]).grams(5)
            a, b = np.unique(grams[: bounds[1]]), np.unique(grams[bounds[1] :])
            assert ours == jaccard(a, b) == pytest.approx(brute_jaccard(text, other))


def test_grams_of_short_texts_are_the_texts() -> None:
    grams, bounds = Units.of(["one two three", "", "one two three", "three two one", "a b c d e f"]).grams(5)
    assert np.diff(bounds).tolist() == [1, 0, 1, 1, 2]
    assert grams[0] == grams[1] != grams[2]


def test_signatures_estimate_jaccard_similarity() -> None:
    """The share of agreeing places has standard deviation √(s(1 - s) / K)."""
    rng = random.Random(1)
    minhash = MinHash(bands=64, rows=8)
    for make in (english, chinese):
        for share in (0.01, 0.03, 0.08):
            text = make(rng, 30)
            other = variant(text, share, rng)
            _, (a, b) = minhash.signatures([text, other])
            true = brute_jaccard(text, other)
            assert abs(float((a == b).mean()) - true) < 4 * (true * (1 - true) / 512) ** 0.5 + 1e-9


def test_the_hash_functions_are_what_they_say() -> None:
    """x ↦ a·(x + d) mod 2³², recomputed with Python's integers, also where sets are larger than a block."""
    minhash = MinHash(seed=7)
    rng = np.random.default_rng(0)
    grams = rng.integers(0, 2**32, 150_000, dtype=np.uint32)
    bounds = np.array([0, 3, 70_000, 149_990, 150_000])
    found = minhash.of(grams, bounds)
    for i, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        for k in (0, 55, 111):
            a, d = int(minhash.a[k]), int(minhash.d[k // 8])
            assert a % 2 == 1
            assert int(found[i, k]) == min((a * (x + d)) % 2**32 for x in grams[start:end].tolist())


def sketched(step: CorpusStep, records: list[Record], folder: Path, cut: int = 7) -> Sketches:
    """The sketches of records in chunks of `cut` rows."""
    folder.mkdir(parents=True)
    (folder / "scratch").mkdir()
    files, starts = [], list(range(0, len(records), cut))
    for start in starts:
        files.append(folder / f"{start}.arrow")
        write_table(step.sketch(Chunk.of(kind_of(records[0]), records[start : start + cut])), files[-1], None)
    return Sketches(files, starts, len(records), folder / "scratch")


def partition(pairs: set[tuple[int, int]]) -> set[frozenset[int]]:
    """The connected components, by hand."""
    of: dict[int, set[int]] = {}
    for a, b in pairs:
        joined = of.get(a, {a}) | of.get(b, {b})
        for row in joined:
            of[row] = joined
    return {frozenset(rows) for rows in of.values()}


def mixed(seed: int, families: int = 40) -> list[Record]:
    """Families of texts at every degree of likeness, in both languages."""
    rng = random.Random(seed)
    records: list[Record] = []
    for i in range(families):
        text = (english if i % 2 else chinese)(rng, 20)
        records.append(Document(text, f"{i}"))
        for j in range(3):
            records.append(Document(variant(text, rng.choice([0.0, 0.01, 0.03, 0.06, 0.3]), rng), f"{i}.{j}"))
    return rng.sample(records, len(records))


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_clusters_are_those_of_plain_banding_and_verification(tmp_path: Path, threshold: float) -> None:
    """Recomputed with dictionaries: at threshold 0 all rows that share a band are one cluster."""
    records, step = mixed(9), NearDedup(threshold=threshold)
    sketches = sketched(step, records, tmp_path / "a")
    signatures = np.concatenate([fixed_width(table["signature"], 112, np.uint32) for table in sketches.tables()])
    meeting = defaultdict(list)
    for row, signature in enumerate(signatures):
        for band in range(14):
            meeting[band, signature[8 * band : 8 * band + 8].tobytes()].append(row)
    pairs = set()
    for rows in meeting.values():
        first = min(rows, key=lambda row: (-len(records[row].text), name_of(records[row].id)))  # type: ignore[union-attr]
        agree = (signatures[rows] == signatures[first]).mean(axis=1) >= threshold
        pairs |= {(first, row) for row, yes in zip(rows, agree, strict=True) if yes and row != first}
    expected = {}
    for cluster in partition(pairs):
        first = min(cluster, key=lambda row: (-len(records[row].text), name_of(records[row].id)))  # type: ignore[union-attr]
        expected |= {row: records[first].id for row in cluster if row != first}
    verdicts = step.decide(sketches, []).to_pydict()
    assert dict(zip(verdicts["row"], verdicts["value"], strict=True)) == expected
    assert verdicts["row"] == sorted(verdicts["row"]) and len(expected) > 40
    assert not list(sketches.scratch.rglob("*.*")), "nothing is left on disk"


def test_pairs_above_the_threshold_are_found_and_pairs_below_are_not() -> None:
    rng = random.Random(4)
    near, far, records = [], [], list[Record]()
    for i in range(80):
        text = (english if i % 2 else chinese)(rng, 20)
        other = variant(text, rng.choice([0.005, 0.01, 0.2, 0.4]), rng)
        similarity = brute_jaccard(text, other)
        (near if similarity > 0.85 else far if similarity < 0.45 else []).append((2 * i, 2 * i + 1))
        records += [Document(text, f"a{i}"), Document(other, f"b{i}")]
    rows = through(NearDedup(), records)
    assert len(near) > 15 and len(far) > 15
    assert all(sum(isinstance(rows[row], Rejected) for row in pair) == 1 for pair in near)
    assert not any(isinstance(rows[row], Rejected) for pair in far for row in pair)


def test_meeting_in_a_band_is_not_enough() -> None:
    rng = random.Random(11)
    text = english(rng, 20)
    other = variant(text, 0.01, rng)
    minhash = MinHash()
    _, (a, b) = minhash.signatures([text, other])
    keys = minhash.bands_of(np.stack([a, b]))
    agreement = float((a == b).mean())
    assert (keys[0] == keys[1]).any() and 0.7 < agreement < 1
    for threshold, joined in ((agreement - 0.001, True), (agreement + 0.001, False)):
        rows = through(NearDedup(threshold=threshold), [Document(text, "a"), Document(other, "b")])
        assert any(isinstance(row, Rejected) for row in rows) is joined


def test_bands_share_no_key() -> None:
    """The same eight numbers in two bands are no meeting."""
    keys = MinHash().bands_of(np.zeros((1, 112), dtype=np.uint32))
    assert len(set(keys[0].tolist())) == 14


def test_simhash_bits_are_the_majority_of_the_grams() -> None:
    from fledge.data.ngrams import mix

    rng = random.Random(5)
    texts = [english(rng), "", chinese(rng), "one", "a b a b a b a b c"]
    rows, words = simhashes(texts, 3)
    assert rows.tolist() == [0, 2, 3, 4]
    grams, bounds = Units.of(texts).grams(3)
    for row, word in zip(rows.tolist(), words.tolist(), strict=True):
        said = mix(grams[bounds[row] : bounds[row + 1]]).tolist()
        for bit in range(64):
            assert (word >> bit) & 1 == (2 * sum((gram >> bit) & 1 for gram in said) > len(said))


@pytest.mark.parametrize("blocks", [4, 6])
def test_simhash_finds_every_pair_within_its_distance(tmp_path: Path, blocks: int) -> None:
    """Against comparing all with all."""
    records, step = mixed(12), SimHashDedup(distance=3, blocks=blocks)
    sketches = sketched(step, records, tmp_path / "a")
    words = np.concatenate([table["simhash"].to_numpy() for table in sketches.tables()])
    every = itertools.combinations(range(len(words)), 2)
    pairs = {(a, b) for a, b in every if int(words[a] ^ words[b]).bit_count() <= 3}
    verdicts = step.decide(sketches, [])
    expected = {row for rows in partition(pairs) for row in rows} - {
        min(rows, key=lambda row: (-len(records[row].text), name_of(records[row].id))) for rows in partition(pairs)  # type: ignore[union-attr]
    }  # fmt: skip
    assert set(verdicts["row"].to_pylist()) == expected
    assert any(words[a] != words[b] for a, b in pairs), "not only equal ones"


def test_simhash_wants_more_blocks_than_distance() -> None:
    with pytest.raises(ValueError, match="blocks must be more than distance"):
        SimHashDedup(distance=4, blocks=4)


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


@pytest.mark.parametrize("step", [ExactDedup(), NearDedup(), SimHashDedup(distance=6, blocks=8)])
def test_the_kept_texts_do_not_depend_on_the_order(step: CorpusStep) -> None:
    records = [*family(5, 3), Document("Same text", "b"), Document("same  TEXT!", "a"), Document("same text", "0")]
    kept = set()
    for seed in range(6):
        order = random.Random(seed).sample(records, len(records))
        kept.add(frozenset(row.id for row in through(step, order) if not isinstance(row, Rejected)))
    assert len(kept) == 1 and len(next(iter(kept))) < len(records)


def test_of_near_copies_the_longest_stays_and_the_others_name_it() -> None:
    records = family(6, 2)
    rows = through(NearDedup(), records)
    kept = {row.id for row in rows if not isinstance(row, Rejected)}
    assert kept == {f"t{i}c1" for i in range(12)}
    assert {row.value for row in rows if isinstance(row, Rejected)} == kept


def test_exact_duplicates_ignore_case_spaces_and_width_but_not_labels() -> None:
    plain = [
        Document("Hello, World", "b"), Document("hello world!!", "a"), Document("ＨＥＬＬＯ world", "c"),
        Document("？", "q1"), Document("！", "q2"), Document("", "e1"), Document("", "e2"),
    ]  # fmt: skip
    labelled = [
        Labelled("hello world", "x", "l1"), Labelled("hello world", "y", "l2"), Labelled("Hello, world", "x", "l0")
    ]  # fmt: skip
    first, second = sorted(("e1", "e2"), key=name_of)
    for records, expected in ((plain, {"b": "a", "c": "a", second: first}), (labelled, {"l1": "l0"})):
        rows = through(ExactDedup(), records)
        assert {
            record.id: row.value for record, row in zip(records, rows, strict=True) if isinstance(row, Rejected)
        } == expected


@pytest.mark.parametrize("step", [ExactDedup(), NearDedup(), SimHashDedup()])
def test_the_same_text_under_two_labels_is_two(step: CorpusStep) -> None:
    text = english(random.Random(2), 20)
    rows = through(step, [Labelled(text, "good", "a"), Labelled(text, "bad", "b"), Labelled(text + " ", "bad", "c")])
    assert [isinstance(row, Rejected) for row in rows] == [False, True, False]


def test_a_dialogue_is_compared_whole() -> None:
    rng = random.Random(8)
    turns = [english(rng, 3) for _ in range(6)]
    same_start = [*turns[:2], *(english(rng, 3) for _ in range(4))]
    copy = [*turns[:5], turns[5] + " Bye."]
    records = [talk(*turns, id="a"), talk(*same_start, id="b"), talk(*copy, id="c")]
    refused = [isinstance(row, Rejected) for row in through(NearDedup(), records)]
    assert refused == [True, False, False], "the longer copy stays, the other dialogue too"


@pytest.mark.parametrize("step", [NearDedup(), SimHashDedup()])
def test_texts_without_a_word_are_no_near_duplicates(step: CorpusStep) -> None:
    rows = [Document("!!", "a"), Document("!!!", "b"), Document("", "c"), Document("", "d")]
    assert through(step, rows) == rows


def test_components_are_those_of_a_search(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for count in (1, 10, 300, 1_000):
        pairs = rng.integers(0, 1_000, (count, 2)) * 7
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        rows, labels = components(pairs)
        found = defaultdict(set)
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            found[label].add(row)
        assert {frozenset(members) for members in found.values()} == partition(set(map(tuple, pairs.tolist())))
    chain = np.stack([np.arange(5_000), np.arange(5_000) + 1], axis=1)
    assert len(set(components(rng.permutation(chain))[1].tolist())) == 1, "a long chain is one"


@pytest.mark.parametrize("in_memory", [2**24, 2**12])
def test_buckets_sort_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    """Against a sort in memory, with one key so frequent that no cutting helps; colliding keys are told apart by the
    second field."""
    monkeypatch.setattr("fledge.data.dedup.buckets._IN_MEMORY", in_memory)
    rng = np.random.default_rng(1)
    dtype = np.dtype([("key", "<u8"), ("check", "<u4"), ("row", "<i8")])
    records = np.zeros(6_000, dtype=dtype)
    records["key"] = rng.integers(0, 2**63, 6_000).astype(np.uint64) * np.uint64(2)
    records["key"][1_000:3_000] = records["key"][rng.integers(0, 900, 2_000)]
    records["key"][3_000:5_000] = 12
    records["check"] = rng.integers(0, 3, 6_000)
    records["row"] = np.arange(6_000)
    orders = []
    for seed in range(2):
        shuffled = np.random.default_rng(seed).permutation(records)
        buckets = Buckets(tmp_path / str(seed), dtype, expected=100, identity=2)
        for part in np.array_split(shuffled, 13):
            buckets.add(part)
        found = list(buckets.groups())
        ends = [(group[0]["key"], group[-1]["key"]) for group in found]
        assert all(a[1] != b[0] for a, b in itertools.pairwise(ends)), "no key is cut in two"
        orders.append(np.sort(np.concatenate(found)).tolist())
        assert not list((tmp_path / str(seed)).iterdir())
    together = defaultdict(list)
    for record in records.tolist():
        together[record[:2]].append(record)
    assert orders[0] == orders[1] == sorted(r for group in together.values() if len(group) > 1 for r in group)
