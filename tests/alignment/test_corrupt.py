"""Spoilt texts: what each way changes, what it leaves alone, and that the same seed spoils alike."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from fledge.alignment.corrupt import corrupt, drop, nearest, reorder, repeat, shuffle

CHINESE = "指非常快地升到很高的地位，很有名望。同“青云直上”。"
ENGLISH = "A sharp tool cuts well, but a blunt one doesn't; sharpen it first."
WAYS = ("shuffle", "reorder", "drop", "repeat")


@pytest.mark.parametrize("text", [CHINESE, ENGLISH])
@pytest.mark.parametrize("kind", WAYS)
def test_a_text_is_spoilt_and_the_same_seed_spoils_it_alike(kind: str, text: str) -> None:
    spoilt = [corrupt(text, kind, Random(seed)) for seed in range(20)]
    assert text not in spoilt and None not in spoilt and len(set(spoilt)) > 1
    assert spoilt == [corrupt(text, kind, Random(seed)) for seed in range(20)]


def test_shuffle_keeps_every_clause_its_own_characters_and_the_marks_their_places() -> None:
    for seed in range(10):
        spoilt = shuffle(CHINESE, Random(seed)) or ""
        assert [i for i, c in enumerate(spoilt) if c in "，。“”"] == [i for i, c in enumerate(CHINESE) if c in "，。“”"]
        for before, after in zip(CHINESE.split("，"), spoilt.split("，"), strict=True):
            assert Counter(before) == Counter(after)


def test_english_is_shuffled_by_words() -> None:
    spoilt = shuffle(ENGLISH, Random(1)) or ""
    first, second = spoilt.split(",")
    assert sorted(first.split()) == ["A", "cuts", "sharp", "tool", "well"]
    assert sorted(second.split(";")[0].split()) == ["a", "blunt", "but", "doesn't", "one"]


def test_reorder_moves_whole_clauses() -> None:
    spoilt = reorder("One, two three; four.", Random(3)) or ""
    assert sorted(spoilt.replace(",", ";").replace(".", "").split("; ")) == ["One", "four", "two three"]
    assert [c for c in spoilt if c in ",;."] == [",", ";", "."]
    assert reorder("Only one clause here", Random(0)) is None


def test_drop_and_repeat_change_the_length_by_the_same_quarter() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(40))
    for seed in range(5):
        less, more = drop(text, Random(seed)) or "", repeat(text, Random(seed)) or ""
        assert (len(less), len(more)) == (30, 50)
        assert all(c in text for c in less) and "".join(dict.fromkeys(more)) == text
    words = (drop("a b c d e f g h", Random(1)) or "").split(" ")
    assert len(words) == 6 and "" not in words
    doubled = (repeat("a b c d e f g h", Random(1)) or "").split(" ")
    assert sum(x == y for x, y in pairwise(doubled)) == 2


@pytest.mark.parametrize("kind", ["shuffle", "drop", "repeat"])
def test_too_short_a_text_is_left_alone(kind: str) -> None:
    assert corrupt("你好", kind, Random(0)) is None
    assert corrupt("", kind, Random(0)) is None


def test_what_cannot_change_is_no_pair() -> None:
    assert corrupt("哈哈哈哈哈哈", "shuffle", Random(0)) is None


def test_nearest_takes_another_text_of_about_the_same_length() -> None:
    texts = sorted(("x" * n for n in range(1, 200)), key=lambda text: (len(text), text))
    for seed in range(20):
        found = nearest("x" * 100, texts, Random(seed)) or ""
        assert found != "x" * 100 and 90 <= len(found) <= 110
    assert nearest("a", ["a"], Random(0)) is None
