"""What an answer says, in English and in Chinese."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.inference.prompting.answers import extract, key, listed, majority
from fledge.inference.prompting.numerals import chinese, numbers, spelled
from fledge.inference.prompting.react import action

DIGITS, PLACES = "零一二三四五六七八九", ("", "十", "百", "千")


def in_chinese(number: int) -> str:
    """0 … 99,999,999 as it is said: 一万零三十."""
    if number == 0:
        return "零"
    if number >= 10_000:
        above, below = divmod(number, 10_000)
        gap = "零" if below and below < 1000 else ""
        return in_chinese(above) + "万" + (gap + in_chinese(below) if below else "")
    said, gap = "", False
    for place in (3, 2, 1, 0):
        digit = number // 10**place % 10
        if digit:
            said += ("零" if gap and said else "") + DIGITS[digit] + PLACES[place]
        gap = not digit
    return said


@given(st.integers(0, 99_999_999))
def test_every_chinese_numeral_is_read(number: int) -> None:
    assert chinese(in_chinese(number)) == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("十五", 15), ("二〇二六", 2026), ("两万五", 25_000), ("一百一", 110), ("三亿五千万", 350_000_000),
        ("壹佰贰拾叁", 123), ("三点五", Fraction(7, 2)), ("零点零五", Fraction(1, 20)), ("三万亿", 3 * 10**12),
    ],
)  # fmt: skip
def test_other_ways_to_say_a_number(text: str, value: Fraction) -> None:
    assert chinese(text) == value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It costs $1,234.50.", ["1234.5"]),
        ("１８个", ["18"]),
        ("三分之二", ["2/3"]),
        ("百分之五十", ["50"]),
        ("-5 and 3-2", ["-5", "3", "2"]),
        ("2.5万元", ["25000"]),
        ("3千万人，2.5万亿元，5百万", ["30000000", "2500000000000", "5000000"]),
        ("3千人，3千克，60千米", ["3000", "3", "60"]),
        ("3 million, 2.5 Billions and 4 men", ["3000000", "2500000000", "4"]),
        ("½ cup", ["0.5"]),
        ("x = −3", ["-3"]),
        ("两个人一共有12个苹果", ["12"]),
        ("no number", []),
        ("1/0", []),
    ],
)
def test_numbers_of_a_text(text: str, found: list[str]) -> None:
    assert numbers(text) == found


@given(st.fractions(max_denominator=1000))
def test_a_number_is_spelled_exactly(value: Fraction) -> None:
    assert Fraction(spelled(value)) == value


@pytest.mark.parametrize(
    ("text", "auto", "number", "choice"),
    [
        ("She has 3. So the answer is 18 dollars.", "18", "18", ""),
        ("15 - 3 = 12，12 + 8 = 20，所以答案是二十。", "20", "20", ""),
        ("答案是 3 + 4 = 7。", "7", "7", ""),
        ("答案：Ｂ", "B", "", "B"),
        ("故选C。", "C", "", "C"),
        ("The answer is (b) a tree.", "B", "", "B"),
        ("I think it is (C)", "C", "", "C"),
        ("...\n#### 1,234", "1234", "1234", ""),
        ("thus $\\boxed{\\frac{3}{4}}$", "0.75", "0.75", ""),
        ("The answer is a dog.", "a dog", "", ""),
        ("A dog barks.", "A dog barks", "", ""),
        ("答案是北京。", "北京", "", ""),
        ("First 5, then the answer is 6. No wait, the answer is 7.", "7", "7", ""),
        ("小明有20个苹果", "小明有20个苹果", "20", ""),
        ("It was Hastings, 1066.", "It was Hastings, 1066", "1066", ""),
        ("答案是《三国演义》，作者罗贯中。", "《三国演义》，作者罗贯中", "3", ""),
        ("20 个苹果", "20", "20", ""),
        ("", "", "", ""),
    ],
)
def test_answers_are_found(text: str, auto: str, number: str, choice: str) -> None:
    assert [extract(text), extract(text, "number"), extract(text, "choice")] == [auto, number, choice]


def test_only_what_is_called_the_answer() -> None:
    assert extract("I have 7 apples", marked=True) == ""
    assert extract("so the answer is 7", marked=True) == "7"


def test_answers_that_mean_the_same() -> None:
    assert len({key(text) for text in ("18", "18 dollars", "１８", "十八", "18.0", "$18")}) == 1
    assert len({key(text) for text in ("B", "(b)", "Ｂ.", "选B")}) == 1
    assert len({key(text) for text in ("是", "Yes.", "对", "correct")}) == 1
    assert key("A dog") != key("A") and key("12") != key("21")


def test_the_majority_and_its_ties() -> None:
    assert majority(["17", "18 dollars", "十八"])[0] == "18 dollars"
    assert majority(["b", "a", "a", "B"])[0] == "b"  # two each: who came first
    assert majority(["", "7", ""])[0] == "7" and majority(["", ""])[0] == ""


def test_lists_are_read_however_they_are_numbered() -> None:
    assert listed("Sure!\n1. one\n2) two\n3、三\n（4）four", 9) == ["one", "two", "三", "four"]
    assert listed("一、甲\n二、乙", 9) == ["甲", "乙"] and listed("- a\n* b", 1) == ["a"]
    assert listed("① 甲\n（二）乙\n第三点：丙", 9) == ["甲", "乙", "丙"]
    assert listed("**1. 春**：花\n### 2. 夏\n3. **秋**", 9) == ["春：花", "夏", "**秋**"]
    assert listed("2 ** 3 = 8\n4 * 5 = 20", 9) == ["2 ** 3 = 8", "4 * 5 = 20"]
    assert listed("1.5 litres\nof milk", 9) == ["1.5 litres", "of milk"]


def test_whatever_a_model_writes_is_read_at_once() -> None:
    begun = time.monotonic()
    n = 20_000
    nested, markers = "\\boxed{" + "{" * n, "答案是" * (n // 3)
    texts = ["9" * n, "(" * n, " " * n + "x", "九" * n, nested, markers, "=" * n, "Action:" + " " * n, "1," * (n // 2)]
    for text in [*texts, "-" * n, "answer (" * (n // 8), "1/" * (n // 2)]:
        for kind in ("auto", "number", "choice", "text"):
            extract(text, kind)
        key(text)
        listed(text, 3)
        action(text)
    assert time.monotonic() - begun < 10
