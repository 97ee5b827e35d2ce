"""Spans and lines that occur again: against looking at every window and every line."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from fledge.data.dedup.spans import Windows
from fledge.data.dedup.units import positions
from fledge.data.steps import CorpusStep, LineDedup, Rejected, SubstringDedup
from fledge.data.texts import UNSPACED, units
from fledge.records.kinds import Conversation, Document, Record, texts

from .conftest import chinese, english, talk, through
from .test_duplicates import name_of, sketched, strange


def brute_windows(text: str, words: int, characters: int) -> list[tuple[int, tuple[str, ...]]]:
    """(end, units) of the window from each unit on, as long as there are whole ones."""
    said, found = units(text), []
    for start in range(len(said)):
        weight, end = 0, start
        while end < len(said) and weight < words * characters:
            weight += words if said[end] in UNSPACED or "一" <= said[end] <= "鿿" else characters
            end += 1
        if weight >= words * characters:
            found.append((end, tuple(said[start:end])))
    return found


def brute_cuts(records: list[Document], words: int, characters: int) -> list[list[bool]]:
    """For each unit of each text whether it is cut."""
    order = sorted(range(len(records)), key=lambda row: (-len(records[row].text), name_of(records[row].id)))
    first: dict[tuple[str, ...], tuple[int, int, int]] = {}
    cut = [[False] * len(units(record.text)) for record in records]
    for row in order:
        for start, (end, said) in enumerate(brute_windows(records[row].text, words, characters)):
            of, _, stays = first.setdefault(said, (row, start, end))
            if first[said] != (row, start, end):
                for i in range(max(start, stays) if of == row else start, end):
                    cut[row][i] = True
    return cut


def patchwork(seed: int) -> list[Document]:
    """Texts sewn from shared and own passages, some periodic, in both languages mixed."""
    rng = random.Random(seed)
    shared = [english(rng, 2) for _ in range(4)] + [chinese(rng, 2) for _ in range(4)]
    records = []
    for i in range(40):
        parts = [rng.choice(shared) if rng.random() < 0.4 else rng.choice((english, chinese))(rng, 2) for _ in range(5)]
        if i % 8 == 0:
            parts.append("so on and " * 30 + "哈哈" * 40)
        records.append(Document(rng.choice((" ", "\n")).join(parts), f"d{i}"))
    return records


def test_windows_are_those_counted_by_hand() -> None:
    rng = random.Random(2)
    said = [strange(rng) for _ in range(40)] + [english(rng, 12), chinese(rng, 12), english(rng, 1) + chinese(rng, 1)]
    found = Windows.of(said, 4, 7)
    hash_of: dict[tuple[str, ...], tuple[int, int]] = {}
    for i, text in enumerate(said):
        if not all(ord(character) < 0x3000 or "一" <= character <= "鿿" for character in text):
            continue
        mine = slice(found.bounds[i], found.bounds[i + 1])
        expected = brute_windows(text, 4, 7)
        assert found.ends[mine].tolist() == [end for end, _ in expected]
        hashes = zip(found.keys[mine].tolist(), found.checks[mine].tolist(), strict=True)
        for (_, window), pair in zip(expected, hashes, strict=True):
            assert hash_of.setdefault(window, pair) == pair, "wherever it stands"
    assert len(set(hash_of.values())) == len({key for key, _ in hash_of.values()}) == len(hash_of) > 150


@pytest.mark.parametrize(("words", "characters"), [(8, 16), (15, 15)])
def test_what_is_cut_is_what_looking_at_every_window_finds(words: int, characters: int) -> None:
    records = patchwork(1)
    counts = Counter[str]()
    rows = through(SubstringDedup(words=words, characters=characters), records, counts)
    cut = brute_cuts(records, words, characters)
    assert sum(map(sum, cut)) > 500
    for record, row, gone in zip(records, rows, cut, strict=True):
        left = [unit for unit, out in zip(units(record.text), gone, strict=True) if not out]
        if isinstance(row, Rejected):
            assert not left and row.reason == "nothing is left of a text"
        else:
            assert units(row.text) == left  # type: ignore[union-attr]
            assert (row == record) is not any(gone)
    assert counts["substring/texts"] == sum(map(any, cut))
    assert counts["substring/characters"] == sum(
        len(record.text) - (0 if isinstance(row, Rejected) else len(row.text))  # type: ignore[union-attr]
        for record, row in zip(records, rows, strict=True)
    )


def test_a_repeated_span_is_left_once_and_cut_at_unit_borders() -> None:
    rng = random.Random(3)
    quote = " ".join(f"word{i}" for i in range(60)) + ". "
    longer = english(rng, 12) + " “" + quote + "” " + english(rng, 2)
    shorter = "Before, " + quote + "after it."
    rows = through(SubstringDedup(), [Document(shorter, "a"), Document(longer, "b")])
    assert rows[1] == Document(longer, "b")
    assert rows[0].text == "Before, after it."  # type: ignore[union-attr]
    short = " ".join(f"word{i}" for i in range(49))
    rows = through(SubstringDedup(), [Document(f"x {short} y", "a"), Document(f"{short} z", "b")])
    assert not any(isinstance(row, Rejected) for row in rows) and rows[0].text == f"x {short} y"  # type: ignore[union-attr]


def test_a_text_that_repeats_itself_keeps_one_window() -> None:
    said = "ha " * 200 + "and so it ended"
    (row,) = through(SubstringDedup(), [Document(said, "a")])
    assert row.text == "ha " * 50 + "and so it ended"  # type: ignore[union-attr]


def test_words_do_not_grow_together_where_something_is_cut() -> None:
    said = ("春夏秋冬东西南北上下左右", "abc春夏秋冬def", "前春夏秋冬后")
    records = [Document(text, str(i)) for i, text in enumerate(said)]
    rows = through(SubstringDedup(words=2, characters=4), records)
    assert [row.text for row in rows] == [records[0].text, "abc def", "前后"]  # type: ignore[union-attr]


def test_turns_are_cut_one_by_one_and_an_empty_turn_refuses_the_row() -> None:
    rng = random.Random(6)
    shared, own = english(rng, 8), [english(rng, 3) for _ in range(4)]
    records: list[Record] = [
        talk(own[0], shared + " " + english(rng, 12), id="a"),
        talk(own[2], "Well: " + shared, id="b"),
        talk(own[3], shared, id="c"),
    ]
    a, b, c = through(SubstringDedup(), records)
    assert a == records[0]
    assert isinstance(b, Conversation) and list(texts(b)) == [own[2], "Well: "]
    assert isinstance(c, Rejected) and c.reason == "nothing is left of a text"


def test_lines_are_kept_once() -> None:
    notice = "Subscribe to our letter, it comes every week and costs nothing at all!"
    chinese_notice = "未经许可，任何单位和个人不得转载、复制本网站的内容。"
    records = [
        Document(f"A long and winding road.\n{notice}\nThe end of this somewhat longer text.\n{chinese_notice}", "a"),
        Document(f"{notice.upper()}\nSomething else.\nYes.\nYes.\n{chinese_notice}", "b"),
        Document(notice, "c"),
        Document("Yes.", "d"),
    ]
    counts = Counter[str]()
    a, b, c, d = through(LineDedup(), records, counts)
    assert a == records[0] and d == records[3], "short lines stay"
    assert b.text == "Something else.\nYes.\nYes.\n"  # type: ignore[union-attr]
    assert isinstance(c, Rejected) and c.reason == "nothing is left of a text"
    assert counts["lines/passages"] == 3 and counts["lines/texts"] == 2


def test_lines_against_a_set_of_all_lines() -> None:
    rng = random.Random(9)
    pool = [english(rng, 1) for _ in range(15)] + [chinese(rng, 1) for _ in range(15)] + ["yes", "好", ""]
    records = [Document("\n".join(rng.choices(pool, k=rng.randint(3, 9))), f"d{i}") for i in range(60)]
    rows = through(LineDedup(minimum=5), records)
    seen: set[str] = set()
    for row in sorted(range(60), key=lambda i: (-len(records[i].text), name_of(records[i].id))):
        left = []
        for line in records[row].text.split("\n"):
            if len(units(line)) < 5 or " ".join(units(line)) not in seen:
                left.append(line)
            if len(units(line)) >= 5:
                seen.add(" ".join(units(line)))
        if isinstance(rows[row], Rejected):
            assert not "".join(left)
        else:
            assert rows[row].text.rstrip("\n") == "\n".join(left).rstrip("\n")  # type: ignore[union-attr]


@pytest.mark.parametrize("step", [SubstringDedup(words=10, characters=20), LineDedup()])
def test_what_is_left_does_not_depend_on_the_order_or_the_chunks(step: CorpusStep, tmp_path: Path) -> None:
    records = patchwork(4)
    results = set()
    for seed in range(4):
        order = random.Random(seed).sample(records, len(records))
        rows = through(step, order)
        left = [row if isinstance(row, Rejected) else row.text for row in rows]  # type: ignore[union-attr]
        results.add(frozenset(zip((record.id for record in order), left, strict=True)))
        folders = {cut: tmp_path / f"{seed}-{cut}" for cut in (99, 6)}
        whole, parts = (step.decide(sketched(step, list(order), at, cut), []) for cut, at in folders.items())
        assert whole.equals(parts)
    assert len(results) == 1


def test_positions_lead_back_into_the_text() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = strange(rng)
        spans = positions(text)
        assert len(spans) == len(units(text))
        assert all(0 <= start < end <= len(text) for start, end in spans) and spans == sorted(spans)
