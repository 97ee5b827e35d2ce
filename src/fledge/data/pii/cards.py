"""Bank cards: the Luhn digit (ISO/IEC 7812-1), and the length and first digits of a network or a mainland bank."""

from __future__ import annotations

import re

from fledge.data.pii.spans import Look, Spans, after, before, luhn

_CARD = re.compile(r"(?<![0-9A-Za-z_.])\d{3,6}(?:[ -]?\d{3,7}){1,5}(?![0-9A-Za-z_]|\.\d|[ -]\d{3})")
_GROUPS = re.compile(
    r"\d+|\d{4}(?:\D\d{4}){2,3}(?:\D\d{1,4})?|\d{4}\D\d{6}\D\d{4,5}|\d{6}\D\d{10,13}|\d{4}(?:\D\d{4}){3}\D?\d{1,3}"
)
_NOT_A_CARD = re.compile(
    r"(?:订单|单号|运单|快递|流水|交易号|编号|批号|条码|货号|序列号|案号|IMEI|ISBN|(?<![a-z])(?:order|tracking|invoice|serial|"
    r"transaction|reference|ref|sku|isbn|case))[^\d\n]{0,12}$",
    re.IGNORECASE,
)
_CARD_WORD = re.compile(r"卡|账号|帐号|账户|\bcard|visa|amex|account", re.IGNORECASE)


def find_cards(look: Look) -> Spans:
    """Card numbers, in one run or in groups; not what is called an order, a parcel or a serial number."""
    text = look.text
    for match in look.near_numbers(_CARD):
        if not _GROUPS.fullmatch(match[0]):
            continue
        number = re.sub("[ -]", "", match[0])
        if len(set(number)) > 1 and issued(number) and luhn(number):
            head = before(text, match.start(), 24)
            if (
                (_CARD_WORD.search(head) or not _NOT_A_CARD.search(head)) and after(text, match.end(), 1) not in "元%"
            ) or (not after(text, match.end(), 1) and not _NOT_A_CARD.search(head)):
                yield match.span()


def issued(number: str) -> bool:
    """Whether a network or a mainland bank issues numbers that begin so and are so long."""
    four, length = int(number[:4]), len(number)
    match number[0]:
        case "4":
            return length in (16, 19)  # Visa
        case "5":
            return (length == 16 and 51 <= four // 100 <= 55) or (12 < length < 20 and four in (5018, 5020, 5038, 5893))
        case "2":
            return length == 16 and 2221 <= four <= 2720  # Mastercard
        case "3":
            if number[:2] in ("34", "37"):
                return length == 15  # American Express
            if 3528 <= four <= 3589:
                return 16 <= length <= 19  # JCB
            return length == 14 and (number[:2] in ("36", "38", "39") or 300 <= four // 10 <= 305)  # Diners Club
        case "6":
            # UnionPay (60–62 and 68 at mainland banks), Discover, Maestro
            return 16 <= length <= 19 and (
                number[1] in "0258" or 6440 <= four <= 6499 or number[:3] in ("630", "639", "676", "670")
            )
        case "8":
            return number[:2] == "81" and 16 <= length <= 19  # UnionPay
        case "9":
            return number[:3] == "955" and length in (16, 18, 19)  # the first cards of ICBC and ABC
    return False
