"""Numbers that a state gives to a person: resident identity cards of the mainland and of Hong Kong; US social security.

GB 11643-1999: six digits of a region (GB/T 2260), eight of a birth date, three of an order, one check digit (ISO 7064,
MOD 11-2; X is ten). Cards before 1999 have fifteen: the year has two digits, and there is no check digit.
"""

from __future__ import annotations

import re
from datetime import date
from functools import cache

from fledge.data.pii.spans import Look, Spans, before

_NEW = re.compile(r"(?<![0-9A-Za-z])[1-8]\d{5}([ -]?)(?:18|19|20)\d{6}\1\d{3}[0-9Xx](?![0-9A-Za-z])")
_OLD = re.compile(r"(?<![0-9A-Za-z.])[1-8]\d{14}(?![0-9A-Za-z]|\.\d)")
_HONG_KONG = re.compile(r"(?<![0-9A-Za-z])[A-Z]{1,2}\d{6} ?[(（][0-9A][)）]")
_SOCIAL = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}([- ]?)(?!00)\d{2}\1(?!0000)\d{4}(?![\d-])")
_SOCIAL_WORD = re.compile(r"(?i:social\s+security|\bssn)\b[^\n]{0,24}$|社会安全号码?[^\n]{0,12}$")
_CARD_WORD = re.compile(r"身份证|身分证|證件|证件|公民身份|ID card|identity", re.IGNORECASE)
_PROVINCE = re.compile(r"1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]")
_WEIGHTS = tuple(2 ** (17 - i) % 11 for i in range(17))


def find_ids(look: Look) -> Spans:
    """Cards of eighteen digits with valid region, date and check digit; of fifteen with a valid date and a region
    that GB/T 2260 lists (or has listed), or with a word for the card in front of them."""
    text = look.text
    for match in look.near_numbers(_NEW):
        if valid(re.sub("[ -]", "", match[0])):
            yield match.span()
    for match in look.near_numbers(_OLD):
        number = match[0]
        if not (_PROVINCE.match(number) and _is_date(f"19{number[6:12]}")):
            continue
        if _CARD_WORD.search(before(text, match.start(), 20)) or number[:6] in _regions():
            yield match.span()
    for match in look.near_numbers(_HONG_KONG):
        if _valid_in_hong_kong(re.sub(r"[^0-9A-Z]", "", match[0])):
            yield match.span()
    for match in look.near_numbers(_SOCIAL):
        if _SOCIAL_WORD.search(before(text, match.start(), 50)):
            yield match.span()


def valid(number: str) -> bool:
    """Whether eighteen digits are the number of a mainland identity card."""
    return bool(_PROVINCE.match(number)) and _is_date(number[6:14]) and number[17].upper() == check_digit(number[:17])


def check_digit(digits: str) -> str:
    """The eighteenth digit for seventeen."""
    return "10X98765432"[sum(map(int.__mul__, map(int, digits), _WEIGHTS)) % 11]


def _is_date(digits: str) -> bool:
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:])).year >= 1800
    except ValueError:
        return False


def _valid_in_hong_kong(number: str) -> bool:
    letters, digits = number[:-7], number[-7:]
    values = [36] * (2 - len(letters)) + [ord(letter) - 55 for letter in letters] + [int(d) for d in digits[:6]]
    total = sum(weight * value for weight, value in zip(range(9, 1, -1), values, strict=True))
    return (total + (10 if digits[6] == "A" else int(digits[6]))) % 11 == 0


@cache
def _regions() -> frozenset[str]:
    """Every six-digit code that GB/T 2260 has had (python-stdnum's table)."""
    return frozenset(code for code, _ in _table())


@cache
def _table() -> tuple[tuple[str, str], ...]:
    """(code, name) of provinces (two digits) and of cities, districts and counties (six)."""
    from importlib.resources import files

    rows: list[tuple[str, str]] = []
    province = ""
    for line in (files("stdnum.cn") / "loc.dat").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"(\d\d) province=\"(.+?)\"", line):
            province = match[1]
            rows.append((province, match[2]))
        elif match := re.match(r" +(\d{4}) county=\"(.+?)\"", line):
            rows += [(province + match[1], re.sub(r"\[.*?\]", "", name)) for name in match[2].split(",")]
    return tuple(rows)


def place_names() -> tuple[tuple[str, str], ...]:
    """(code, name) of every administrative division of the mainland down to the county, former ones included."""
    return _table()
