"""Numbers as people and models write them: 1,234.50, １８, 3/4, 五十六, 三点五, 三分之二, 2.5万, 3 million."""

from __future__ import annotations

import math
import re
import unicodedata
from fractions import Fraction

_DIGITS = {char: value for value, char in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2, "○": 0}
_FORMAL = str.maketrans("壹贰叁肆伍陆柒捌玖拾佰仟萬億弍貳參陸", "一二三四五六七八九十百千万亿二二三六")
_SMALL, _LARGE = {"十": 10, "百": 100, "千": 1000}, {"万": 10**4, "亿": 10**8}
_ENGLISH = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_HAN = "零一二三四五六七八九〇两兩○十百千万亿壹贰叁肆伍陆柒捌玖拾佰仟萬億弍貳參陸"

_SCALE = rf"[十百千]?[万亿]+|[百千](?![克米瓦卡升帕赫分])|(?i:{'|'.join(_ENGLISH)})s?\b"
"""3千万, 2.5万亿, 3千 (not 3千克), 3 million"""
_ARABIC = r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_LONGEST = 400  # characters; a row of digits beyond that is no number that anybody meant
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−–]\s?|负\s?)?[$€£¥]?\s?"
    rf"(?:(?P<arabic>{_ARABIC})(?:\s?(?P<scale>{_SCALE}))?(?:\s?/\s?(?P<below>\d+))?"
    rf"|(?P<parts>[{_HAN}]+)分之(?P<share>[{_HAN}]+)|(?P<han>[{_HAN}]+(?:点[{_HAN}]+)?))"
)
"""A number in a text that is NFKC already."""


def plain(text: str) -> str:
    """NFKC: full-width digits and letters become the usual ones."""
    return unicodedata.normalize("NFKC", text).replace("\u2044", "/")


def numbers(text: str) -> list[str]:
    """Every number of a text, normalised ("18", "3.5", "2/3", "-2"), in order; units and percent signs are left out.

    Chinese numerals count only where there are no digits: 一 is a part of too many words.
    """
    found = list(NUMBER.finditer(plain(text)))
    values = [_value(match) for match in found if match["arabic"]] or [_value(match) for match in found]
    return [spelled(value) for value in values if value is not None]


def number_in(text: str) -> str:
    """The one number that a text is, whatever its sign, unit or currency; "" where it has none or several."""
    found = numbers(text)
    return found[0] if len(found) == 1 else ""


def spelled(value: Fraction) -> str:
    """An integer, an exact decimal, or a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    twos_and_fives = value.denominator
    for prime in (2, 5):
        while twos_and_fives % prime == 0:
            twos_and_fives //= prime
    if twos_and_fives != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    whole = str(abs(value * 10**digits).numerator).rjust(digits + 1, "0")
    return ("-" if value < 0 else "") + f"{whole[:-digits]}.{whole[-digits:]}"


def chinese(text: str) -> Fraction | None:
    """The value of a Chinese numeral (二百零五, 三点五, 二〇二六, 两万五); None when it is none."""
    whole, _, decimals = text.translate(_FORMAL).partition("点")
    value = _integer(whole)
    if value is None or any(char not in _DIGITS for char in decimals):
        return None
    digits = "".join(str(_DIGITS[char]) for char in decimals)
    return value + (Fraction(int(digits), 10 ** len(digits)) if digits else 0)


def _integer(text: str) -> Fraction | None:
    """Digits one after another (二〇二六), or places: sections below 万 and 亿 added up."""
    if not text:
        return None
    if all(char in _DIGITS for char in text):
        return Fraction(int("".join(str(_DIGITS[char]) for char in text)))
    total = section = digit = last = 0
    for char in text:
        if char in _DIGITS:
            digit = _DIGITS[char]
            last = 1 if digit == 0 else last  # after a zero the last digit stands for ones: 一百零五
        elif char in _SMALL:
            section += (digit or 1) * _SMALL[char]
            digit, last = 0, _SMALL[char] // 10
        else:
            above, total = (total, 0) if char == "亿" else (0, total)  # 三万亿: 亿 multiplies what is before it
            total += (above + section + digit or 1) * _LARGE[char]
            section, digit, last = 0, 0, _LARGE[char] // 10
    return Fraction(total + section + digit * (last or 1))  # 两万五: the 五 stands for thousands


def _scale(word: str) -> int:
    """千万 is 10⁷, 万亿 10¹², million 10⁶."""
    return _ENGLISH.get(word.lower().rstrip("s")) or math.prod((_SMALL | _LARGE)[char] for char in word)


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] else 1
    if len(match.group()) > _LONGEST:
        return None
    if match["arabic"]:
        value = Fraction(match["arabic"].replace(",", ""))
        if match["scale"]:
            value *= _scale(match["scale"])
        if match["below"]:
            if int(match["below"]) == 0:
                return None
            value /= int(match["below"])
        return sign * value
    if match["parts"]:
        below, above = chinese(match["parts"]), chinese(match["share"])
        if below is None or above is None or not below:
            return None
        return sign * (above if below == 100 else above / below)  # 百分之五十 as 50%
    value_of_han = chinese(match["han"])
    return None if value_of_han is None else sign * value_of_han
