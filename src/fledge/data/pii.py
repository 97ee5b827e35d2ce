"""Personal data in text: where it is, and masks in its place.

No pattern uses `\\b`: between 张三 and zhang@qq.com there is none. Everything that has a check digit is checked, so
that order numbers, dates and versions stay. Full-width digits, letters and ＠ count as their narrow forms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

KINDS = ("email", "id", "card", "ip", "phone")
MASKS = {"email": "[EMAIL]", "id": "[ID]", "card": "[CARD]", "ip": "[IP]", "phone": "[PHONE]"}


@dataclass(frozen=True)
class Found:
    """`text[start:end]` is personal data of `kind`."""

    start: int
    end: int
    kind: str


_NARROW = {i: i - 0xFEE0 for i in range(0xFF01, 0xFF5F)} | {
    0x3000: 0x20,
    0x2010: 0x2D,
    0x2011: 0x2D,
    0x2013: 0x2D,
    0x2212: 0x2D,
}

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9](?:[A-Za-z0-9._%+'-]{0,62}[A-Za-z0-9_+-])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
_ID = re.compile(r"(?<![0-9A-Za-z])[1-9]\d{5}(?:18|19|20)\d{9}[0-9Xx](?![0-9A-Za-z])")
_CARD = re.compile(
    r"(?<![\d.])[2-6]\d{3}(?:[ -]?\d{4}){2}(?:[ -]?\d{1,7})(?![\d])|(?<![\d.])3[47]\d{2}[ -]?\d{6}[ -]?\d{5}(?!\d)"
)
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IP = re.compile(rf"(?<![\d.A-Za-z_]){_OCTET}(?:\.{_OCTET}){{3}}(?!\d|\.\d|[A-Za-z_])")
_VERSION = re.compile(r"(?:(?<![A-Za-z])(?:version|release|ver)\.?|版本号?)\s*[:：]?\s*$", re.IGNORECASE)
_MOBILE = re.compile(r"(?<![\d.])(?:(?:\+|00)86[ -]?)?1[3-9]\d(?:[ -]?\d{4}){2}(?![\d]|\.\d)")
_PHONE_LIKE = re.compile(r"(?:\+|\(|（)?\d[\d ()（）./-]{5,}\d")
_DIGITS = re.compile(r"\d[\d .()-]{5,}\d")
_WORTH_A_LOOK = re.compile(r"[@＠]|[0-9０-９].{5}", re.DOTALL)
_REGIONS = {"zh": "CN", "en": "US"}


def find(text: str, language: str = "", kinds: Iterable[str] = KINDS) -> list[Found]:
    """Personal data in `text`, in order, without overlap; what is checked strictest comes first where two overlap.

    email; id: mainland ID card with valid date and check digit (GB 11643); card: bank card (Luhn, a first digit of a
    card network); ip: IPv4, not a version number, not the machine itself; phone: mainland mobiles, and what the
    numbering plans of `language`'s region (China, USA) or of the +country say is a number.
    """
    if not _WORTH_A_LOOK.search(text):
        return []
    narrow = text if text.isascii() else text.translate(_NARROW)  # as long as `text`: positions stay
    wanted = set(kinds)
    digits = _DIGITS.search(narrow) is not None
    found: list[Found] = []
    taken = bytearray(len(text))
    for kind, present, finder in (
        ("email", "@" in narrow, _emails),
        ("id", digits, _ids),
        ("card", digits, _cards),
        ("ip", digits, _ips),
        ("phone", digits, lambda t: _phones(t, language)),
    ):
        if not present or kind not in wanted:
            continue
        for start, end in finder(narrow):
            if not any(taken[start:end]):
                taken[start:end] = b"\x01" * (end - start)
                found.append(Found(start, end, kind))
    return sorted(found, key=lambda item: item.start)


def mask(text: str, language: str = "", counts: Counter[str] | None = None, kinds: Iterable[str] = KINDS) -> str:
    """The text with masks such as [EMAIL] in place of personal data; adds to `counts` by kind."""
    found = find(text, language, kinds)
    if not found:
        return text
    parts, at = [], 0
    for item in found:
        parts += [text[at : item.start], MASKS[item.kind]]
        at = item.end
        if counts is not None:
            counts[item.kind] += 1
    return "".join([*parts, text[at:]])


Spans = Iterator[tuple[int, int]]


def _emails(text: str) -> Spans:
    return (match.span() for match in _EMAIL.finditer(text))


def _ids(text: str) -> Spans:
    from stdnum.cn import ric

    return (match.span() for match in _ID.finditer(text) if ric.is_valid(match[0].upper()))


def _cards(text: str) -> Spans:
    from stdnum import luhn

    for match in _CARD.finditer(text):
        number = re.sub(r"[ -]", "", match[0])
        if 15 <= len(number) <= 19 and len(set(number)) > 1 and luhn.is_valid(number):
            yield match.span()


def _ips(text: str) -> Spans:
    for match in _IP.finditer(text):
        before = text[max(0, match.start() - 16) : match.start()]
        if match[0] not in ("127.0.0.1", "0.0.0.0", "255.255.255.255") and not _VERSION.search(before):
            yield match.span()


def _phones(text: str, language: str) -> Spans:
    for match in _MOBILE.finditer(text):
        yield match.span()
    region = _REGIONS.get(language)
    for candidate in _PHONE_LIKE.finditer(text):
        if 7 <= sum(c.isdigit() for c in candidate[0]) <= 17:
            yield from _by_plan(text, candidate.start(), candidate.end(), region)


def _by_plan(text: str, start: int, end: int, region: str | None) -> Spans:
    """Numbers that the numbering plans know inside a stretch of text and a few characters around it."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    low, high = max(0, start - 2), min(len(text), end + 8)  # an extension may follow
    for match in PhoneNumberMatcher(text[low:high], region, leniency=Leniency.VALID, max_tries=32):
        if match.raw_string[:1] in "+(" or re.search(r"[ ()/.-]", match.raw_string) or len(match.raw_string) > 9:
            yield low + match.start, low + match.end
