"""Passports and travel permits: letters and digits that only a word beside them can tell from an order number."""

from __future__ import annotations

import re

from fledge.data.pii.spans import Look, Spans, after, before

_NUMBER = re.compile(r"(?<![0-9A-Za-z_.-])(?=(?:[A-Z]*\d){4})[A-Z0-9]{8,10}(?![0-9A-Za-z_@]|[.-][0-9A-Za-z])")
_FORM = re.compile(
    r"[DEGHKPS]\d{8}|E[A-HJ-NP-Z]\d{7}|[DPS]E\d{7}|1[45]\d{7}"  # mainland; 14 and 15 are before 1997
    r"|[CHMW]\d{8,10}|[A-Z]\d{7}|[A-Z]\d{8}|[A-Z]{2}\d{6,7}|[A-Z]\d{7}[A-Z]|\d{9}"  # permits; most states
    r"|\d{2}[A-Z]{2}\d{5}|[A-Z]{3}\d{6}|[CFGHJK][0-9CFGHJKLMNPRTVWXYZ]{8}|\d{8}"
)
_WORDS = ["护照", "護照", "通行证", "通行證", "旅行证", "旅行證", "台胞证", "回乡证", "passport", "travel"]
_FIELD = re.compile(
    r"(?:护照|護照|通行[证證]|旅行[证證]|台胞证|回乡证)[^\n。；;]{0,14}$|"
    r"(?:passport|travel (?:document|permit))[^\n;]{0,36}$",
    re.IGNORECASE,
)
_OTHER = re.compile(
    r"(?:订单|单号|型号|编号|货号|批号|电话|手机|邮编|日期|航班|签证|visa|order|model|sku|flight|invoice|tel|phone|date|issued|"
    r"签发|有效期|工号|学号)[^\n，,。；;]{0,12}$",
    re.IGNORECASE,
)
_BEHIND = re.compile(r"[\s，,的号]{0,2}(?:[（(]?(?:护照|護照|passport))", re.IGNORECASE)
_DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])")


def find_passports(look: Look) -> Spans:
    """Numbers of a known form with 护照, `passport` or the like before them in the same clause, or right behind."""
    text = look.text
    if not look.has(_WORDS):
        return
    ends: list[int] = []
    for match in _NUMBER.finditer(text):
        number = match[0]
        if not _FORM.fullmatch(number) or _DATE.fullmatch(number):
            continue
        head = before(text, match.start(), 60)
        if ends and match.start() - ends[-1] < 8 and not re.search(r"[。；;\n]", text[ends[-1] : match.start()]):
            near = True  # one of a list
        else:
            near = bool(_FIELD.search(head)) and not _OTHER.search(head)
            near = near or (number[0].isalpha() and bool(_BEHIND.match(after(text, match.end(), 12))))
        if near and not (number.isdigit() and len(number) == 8 and not re.search(r"[:：号為为is#]\s?$", head)):
            ends.append(match.end())
            yield match.span()
