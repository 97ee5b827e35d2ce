"""Personal data and secrets in text: where they are, and masks or invented values in their place.

One file a family of detectors; each is a function from a text to spans. No pattern uses `\\b`: between 张三 and
zhang@qq.com there is none. What has a check digit is checked; what has none needs a form or a word beside it that an
order number, a date or a version does not have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from fledge.data.pii.addresses import find_addresses
from fledge.data.pii.cards import find_cards
from fledge.data.pii.emails import find_emails
from fledge.data.pii.ids import find_ids
from fledge.data.pii.ips import KEEPABLE, find_ips
from fledge.data.pii.passports import find_passports
from fledge.data.pii.phones import find_phones
from fledge.data.pii.plates import PROVINCES, find_plates
from fledge.data.pii.secrets import find_secrets
from fledge.data.pii.spans import Found, Look, Options, Spans, narrow

__all__ = ["KEEPABLE", "KINDS", "MASKS", "Found", "Options", "find", "mask", "replace"]

# The order decides where two overlap: what is checked strictest comes first.
_DETECTORS: dict[str, Callable[[Look], Spans]] = {
    "secret": find_secrets,
    "email": find_emails,
    "id": find_ids,
    "card": find_cards,
    "ip": find_ips,
    "address": find_addresses,
    "passport": find_passports,
    "plate": find_plates,
    "phone": find_phones,
}
KINDS = ("email", "id", "card", "ip", "phone", "passport", "address", "plate", "secret")
MASKS = {kind: f"[{kind.upper()}]" for kind in KINDS}

# Every find has one of these characters in it, and most texts of prose have none of them.
_START = re.compile(
    rf"[@＠0-9０-９:]|[号號弄室院](?![线令])|[{PROVINCES}W][A-ZＡ-Ｚ]|[Pp][Aa][Ss][Ss]|[Pp][Ww][Dd]|"
    r"[Ss][Ee][Cc][Rr]|[Tt][Oo][Kk][Ee]|[Kk][Ee][Yy]|"
    r"PRIVATE|[密口令][码碼令钥鑰牌]| at |\(at"
)
_NEEDS_DIGITS = frozenset(("id", "card", "phone"))


def find(text: str, kinds: Iterable[str] = KINDS, options: Options | None = None) -> list[Found]:
    """Personal data in `text`, in order, without overlap."""
    if not _START.search(text):
        return []
    look, wanted = Look(narrow(text), options or Options()), set(kinds)
    found: list[Found] = []
    taken = bytearray(len(text))
    for kind, detector in _DETECTORS.items():
        if kind not in wanted or (kind in _NEEDS_DIGITS and not look.numbers):
            continue
        for start, end in detector(look):
            if not any(taken[start:end]):
                taken[start:end] = b"\x01" * (end - start)
                found.append(Found(start, end, kind))
    return sorted(found, key=lambda item: item.start)


def replace(
    text: str,
    by: Callable[[str, str], str],
    counts: Counter[str] | None = None,
    kinds: Iterable[str] = KINDS,
    options: Options | None = None,
) -> str:
    """The text with `by(kind, original)` in place of each find; adds to `counts` by kind."""
    found = find(text, kinds, options)
    if not found:
        return text
    parts, at = [], 0
    for item in found:
        parts += [text[at : item.start], by(item.kind, text[item.start : item.end])]
        at = item.end
        if counts is not None:
            counts[item.kind] += 1
    return "".join([*parts, text[at:]])


def mask(
    text: str,
    counts: Counter[str] | None = None,
    kinds: Iterable[str] = KINDS,
    options: Options | None = None,
) -> str:
    """The text with masks such as [EMAIL] in place of personal data. Masking twice changes nothing more."""
    kinds = tuple(kinds)
    while (masked := replace(text, _mask, counts, kinds, options)) != text:
        text = masked  # a mask is shorter than an address: a word such as 电话 may now stand near another number
    return text


def _mask(kind: str, original: str) -> str:
    return MASKS[kind]
