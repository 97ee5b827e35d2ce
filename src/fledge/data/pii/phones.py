"""Telephone numbers: of the mainland by rules of its own, of Hong Kong, Macao and Taiwan, and of the world by the
numbering plans that `phonenumbers` knows. Order numbers, amounts, dates and hot lines of three to five digits stay."""

from __future__ import annotations

import re

from fledge.data.pii.spans import Look, Spans, after, before

_L = r"(?<![0-9A-Za-z_.])"  # a number begins here
_R = r"(?![0-9A-Za-z_]|\.\d)"
_EXTENSION = r"(?:\s?(?:转|轉|分机|分機|[Ee]xt\.?:?|x|#)\s?\d{1,6}(?!\d)|-\d{1,5}(?![\d-]))?"
_MOBILE = re.compile(
    r"(?<![0-9_.])(?:(?:(?:\+|00) ?86|[(（]\+?86[)）]|86)[ -]?)?1[3-9]\d(?:[ -]?\d{4}[ -]?\d{4}|"
    r"[ -]\d{3}[ -]\d{5}|[ -]\d{5}[ -]\d{3})" + _R
)
_AREA = r"(?:10|2[0-57-9]|[3-9]\d{2})"
_LAND = re.compile(
    rf"(?<![0-9A-Za-z_.+-])(?:(?:(?:\+|00)? ?86[ -]|[(（]\+?86[)）][ -]?|\+86|86(?={_AREA}-))"
    rf"[(（]?0?{_AREA}[)）]?[ -]?|"
    rf"[(（]0{_AREA}[)）] ?-?|0{_AREA}[ -]?)"
    rf"[1-9]\d{{2,3}}[ -]?\d{{4}}{_EXTENSION}{_R}"
)
_SERVICE = re.compile(
    rf"{_L}[48]00(?:[ -]\d{{3}}[ -]?\d{{4}}|[ -]\d{{4}}[ -]?\d{{3}}|[ -]\d{{7}}|\d{{7}}|"
    rf"[ -]\d{{2,3}}[ -]\d{{2,3}}[ -]\d{{2,3}}){_EXTENSION}{_R}"
)
_TAIWAN = re.compile(
    rf"{_L}(?:09\d{{2}}-?\d{{3}}-?\d{{3}}|09\d{{2}} \d{{3}} \d{{3}}|"
    rf"[(（]0[2-8]\d?[)）] ?\d{{3,4}}-?\d{{4}}|0[2-8]-\d{{4}}-\d{{4}}){_EXTENSION}{_R}"
)
_LOCAL = re.compile(rf"{_L}[2-9]\d{{2,3}}[ -]?\d{{4}}{_EXTENSION}{_R}")
_ABROAD = re.compile(rf"(?<![0-9A-Za-z_.+])(?:\+|00)[1-9](?:[ .()\-/]{{0,2}}\d){{6,14}}{_EXTENSION}{_R}")
_NEAR = re.compile(
    rf"{_L}[(（]?(?:852[)）]?[ -]?[2-9]\d{{3}}|853[)）]?[ -]?[268]\d{{3}}|"
    rf"886[)）]?[ -]?\d[ -]?\d{{3,4}})[ -]?\d{{4}}{_R}"
)
_AMERICA = re.compile(
    r"(?<![0-9A-Za-z_.+-])(?:1[ .-])?(?:\([2-9]\d\d\)[ .-]?|[2-9]\d\d([ .-]))[2-9]\d\d[ .-]\d{4}"
    r"(?:\s?(?:[Ee]xt\.?:?|x)\s?\d{1,6})?(?![0-9A-Za-z_-]|\.\d)"
)
_NATIONAL = re.compile(
    r"(?<![0-9A-Za-z_.+])(?:\(0\d{1,4}\) ?\d{3,4}(?:[ -]?\d{3,4})?|0\d{1,4}(?:[ -]\d{2,4}){2,4}|"
    r"0\d{4}[ -]\d{5,6}|0\d{9,10})" + _R
)
_IN_USE = re.compile(r"1(?:[38]|4[5-9]|5[0-35-9]|6[12567]|7[0-8]|9[0-35-9])")
_WORD = re.compile(
    r"(?:电话|電話|手机|手機|座机|固话|传真|傳真|热线|熱線|专线|致电|拨打|来电|客服|联系方式|联系人|微信|whatsapp|(?<![a-z])(?:tel|phone|"
    r"telephone|mobile|cell|fax|call|dial|contact|ring|hotline|text|sms)(?![a-z]))",
    re.IGNORECASE,
)
_RIGHT_BEFORE = re.compile(
    r"(?:电话|電話|手机|手機|座机|固话|传真|傳真|热线|熱線|专线|致电|拨打|(?<![a-z])(?:tel|phone|telephone|mobile|cell|fax|"
    r"call|hotline)(?![a-z]))"
    r"(?:号码?|號碼|(?: (?:number|no\.?|us|me)| at| on|\()*)[)）]?\s{0,2}(?:[:：是为為]|is|at|\.)?\s{0,2}"
    r"(?:[\d-]{7,14}\s?[、,，/或]\s?)?$",
    re.IGNORECASE,
)
_NOT_A_PHONE = re.compile(
    r"(?:订单|訂單|单号|運單|流水号?|编号|編號|批号|序列号|货号|条码|案号|文号|学号|工号|邮编|QQ号?|账号|帐号|卡号|税号|第|信用代码|执照|型号|"
    r"(?<![a-z])(?:order|tracking|invoice|serial|transaction|reference|sku|id|isbn|issn|doi|pid|uid|"
    r"no|port|size|ticket|part|item|case))"
    r"(?:号码?|\s?number|\s?no\.?)?[\s:：#＃=是为(（\"']{0,4}[A-Z-]{0,4}$",
    re.IGNORECASE,
)
_AMOUNT = re.compile(
    r"\s?(?:[元万亿吨斤克米个人次件份股条票台册字位倍%％‰]|美元|港元|公里|字节|毫秒|[KMGT]?B(?![a-z])|bytes?|km|kg|ms|USD|RMB|"
    r"people|users|times|rows|tokens)"
)
_MONEY = re.compile(r"[¥￥$€£]\s?$")


def find_phones(look: Look) -> Spans:
    """Numbers in the forms people write them; a bare local number only behind a word such as 电话 or `tel`."""
    text = look.text
    found: list[tuple[int, int]] = []
    taken = bytearray(len(text) if look.numbers else 0)
    for pattern, right in (
        (_MOBILE, _mobile), (_LAND, _land), (_ABROAD, _abroad), (_AMERICA, _america), (_SERVICE, _service),
        (_TAIWAN, _taiwan), (_NEAR, _near), (_NATIONAL, _national), (_LOCAL, _local),
    ):  # fmt: skip
        for match in look.near_numbers(pattern):
            start, end = match.span()
            if not any(taken[start:end]) and right(text, match):
                taken[start:end] = b"\x01" * (end - start)
                found.append((start, end))
    yield from sorted(found)


def _counts_something(text: str, start: int, end: int) -> bool:
    """Whether the digits are an amount, or the number of an order and not of a person."""
    head = before(text, start, 24)
    return bool(_AMOUNT.match(after(text, end, 8)) or _MONEY.search(head) or _NOT_A_PHONE.search(head))


def _spoken_of(text: str, start: int, characters: int = 24) -> bool:
    return bool(_WORD.search(before(text, start, characters)))


def _mobile(text: str, match: re.Match[str]) -> bool:
    head = before(text, match.start(), 12)
    glued = re.search(r"[A-Za-z]+$", head)
    if glued and not _WORD.fullmatch(glued[0]) and glued[0] not in ("T", "M", "P"):
        return False
    national = re.sub(r"\D", "", match[0])[-11:]
    return _plausible_mobile(national) and ("+" in match[0] or not _counts_something(text, *match.span()))


def _plausible_mobile(number: str) -> bool:
    """Prefixes in use (MIIT): 154, 140–144 and the like have never been given out."""
    return _IN_USE.match(number) is not None


def _land(text: str, match: re.Match[str]) -> bool:
    import phonenumbers

    written = re.split(r"(?:转|轉|分机|分機|[Ee]xt|x|#)", match[0])[0]
    digits = re.sub(r"\D", "", written)
    if digits.startswith("0086"):
        digits = digits[4:]
    elif digits.startswith("86") and not written.lstrip("(（").startswith("0"):
        digits = digits[2:]
    digits = "0" + digits.lstrip("0")
    if re.fullmatch(r"[^-]*-[^-]*-\d{1,5}", written) and not _valid_land(digits):
        digits = "0" + re.sub(r"\D", "", written.rsplit("-", 1)[0]).removeprefix("86").lstrip("0")
    if digits == re.sub(r"\D", "", match[0]) and match[0].isdigit() and not _spoken_of(text, match.start()):
        return phonenumbers.is_valid_number(phonenumbers.parse(digits, "CN")) and not _counts_something(
            text, *match.span()
        )
    return _valid_land(digits) and not _counts_something(text, *match.span())


def _valid_land(digits: str) -> bool:
    """Area codes of three digits (010, 02x) go with eight digits, those of four with seven or eight."""
    area = 3 if digits[1] in "12" else 4
    return len(digits) - area in ((8,) if area == 3 else (7, 8))


def _service(text: str, match: re.Match[str]) -> bool:
    if "-" not in match[0] and not _spoken_of(text, match.start()):
        return False
    return not _counts_something(text, *match.span())


def _taiwan(text: str, match: re.Match[str]) -> bool:
    return (
        (not match[0].isdigit() or _spoken_of(text, match.start()))
        and valid(match[0], "TW")
        and not _counts_something(text, *match.span())
    )


def _near(text: str, match: re.Match[str]) -> bool:
    """Hong Kong, Macao and Taiwan with their code and without +."""
    return _spoken_of(text, match.start()) and valid("+" + re.sub(r"\D", "", match[0]), "HK")


def _abroad(text: str, match: re.Match[str]) -> bool:
    """With a country's code. Numbers of plans set aside for fiction and drama are numbers too: length decides."""
    import phonenumbers

    written = re.sub(r"^00", "+", match[0])
    if re.search(r"\d{5}\.\d{1,2}$", written):
        return False  # a decimal number with its sign
    if match[0].startswith("00") and not re.search(r"[ ()-]", match[0]) and not _spoken_of(text, match.start()):
        return False
    try:
        number = phonenumbers.parse(re.sub(r"\(0\)", "", written), None)
    except phonenumbers.NumberParseException:
        return False
    if phonenumbers.is_valid_number(number):
        return True
    if number.country_code in (1, 86):
        return False  # their plans are simple and known
    possible = phonenumbers.is_possible_number_with_reason(number) == phonenumbers.ValidationResult.IS_POSSIBLE
    return possible and (_spoken_of(text, match.start()) or bool(re.search(r"[ ()-]", match[0][2:])))


def _america(text: str, match: re.Match[str]) -> bool:
    dots = match[0].count(".") > 0
    if _counts_something(text, *match.span()) or (
        (dots or " " in match[0][5:]) and "-" not in match[0] and not valid(match[0], "US")
    ):
        return False
    return valid(match[0], "US")


def _national(text: str, match: re.Match[str]) -> bool:
    """National forms of other countries, with a word for a telephone near by."""
    if not _spoken_of(text, match.start()) or _counts_something(text, *match.span()):
        return False
    return any(valid(match[0], region) for region in ("CN", "GB", "TW", "JP", "DE", "FR", "AU", "IT", "KR"))


def _local(text: str, match: re.Match[str]) -> bool:
    """Seven or eight digits right behind the word."""
    if not _RIGHT_BEFORE.search(before(text, match.start(), 40)):
        return False
    return not re.fullmatch(r"20\d\d[01]\d[0-3]\d", match[0]) and not _AMOUNT.match(after(text, match.end(), 8))


def valid(written: str, region: str) -> bool:
    """Whether the numbering plan of the region (or of the +country) has the number."""
    import phonenumbers

    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(written, region))
    except phonenumbers.NumberParseException:
        return False
