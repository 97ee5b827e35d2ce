"""Licence plates of the mainland (GA 36-2018): ordinary, new-energy, and those that end or begin with a character."""

from __future__ import annotations

import re

from fledge.data.pii.spans import Look, Spans, before

PROVINCES = "京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤川青藏琼宁"
_SIGN = "[A-HJ-NP-Z0-9]"  # no I, no O
_PLATE = re.compile(
    rf"[{PROVINCES}][A-HJ-NP-Z][ ·•・.‧-]?(?:"
    rf"[A-HJK]{_SIGN}\d{{4}}|\d{{5}}[A-HJK]"  # new-energy: small, large
    rf"|{_SIGN}{{4}}(?:[挂学警港澳试超领使]|应急)|{_SIGN}{{5}})(?![0-9A-Za-z]|[.-]\d)"
    rf"|[{PROVINCES}][A-HJ-NP-Z][ ·•]?\d{{4}}领|(?<![0-9A-Za-z])使 ?[ ·•]?\d{{3}}[ ·•]?\d{{3}}(?!\d)|"
    rf"(?<!\d)\d{{3}} ?\d{{3}}[使领](?![馆用事])"
    rf"|(?<![0-9A-Za-z])WJ ?[{PROVINCES}][ ·•]?(?:\d{{4}}[0-9A-Z]|\d{{5}})(?![0-9A-Za-z])",
    re.IGNORECASE,
)
_OWN_NAME = re.compile("[东南北]京|天津|四川|西藏|辽宁|[南西]宁")
_HINT = re.compile(rf"[{PROVINCES}W使][A-HJ-NP-Za-hj-np-z0-9·•・ ]|[0-9][使领]")
_EMBASSY = re.compile(r"车|牌|号")


def find_plates(look: Look) -> Spans:
    """Plates with or without the dot; the character of a province that ends its own name (南京) starts none."""
    text = look.text
    for match in look.matches(_PLATE, _HINT, 8, 12):
        sign = match[0]
        if sign[0] in PROVINCES:
            tail = re.sub(r"[^0-9A-Za-z]", "", sign[2:])
            if not any(map(str.isdigit, tail)) or (len(sign) > 1 and sum(map(str.isalpha, tail)) > 3):
                continue
            if _OWN_NAME.fullmatch(before(text, match.start(), 1) + sign[0]):
                continue
        elif sign[0] != "W" and not _EMBASSY.search(before(text, match.start(), 12)):
            continue
        yield match.span()
