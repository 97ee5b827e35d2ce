"""Personal data, hard cases in both languages: what must go, and what must stay."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.pii import MASKS, find, mask
from fledge.data.steps import PII
from fledge.records.kinds import Answer, Conversation, Message, Preference

from .conftest import through

MASKED = [
    ("张三zhang@qq.com，请回复", "zh", "张三[EMAIL]，请回复"),
    ("邮箱：Li.Si+work@mail.example.com.cn。", "zh", "邮箱：[EMAIL]。"),
    ("ｚｈａｎｇ＠ｑｑ．ｃｏｍ", "zh", "[EMAIL]"),
    ("Write to a@b.co.uk, or to x_y@sub.example.org.", "en", "Write to [EMAIL], or to [EMAIL]."),
    ("我的手机是13812345678，随时打", "zh", "我的手机是[PHONE]，随时打"),
    ("电话１３８１２３４５６７８", "zh", "电话[PHONE]"),
    ("+86 138 1234 5678 或 0086-13912345678", "zh", "[PHONE] 或 [PHONE]"),
    ("座机010-62345678，传真（021）6234 5678", "zh", "座机[PHONE]，传真[PHONE]"),
    ("call (415) 555-2671 or +44 20 7946 0958 now", "en", "call [PHONE] or [PHONE] now"),
    ("身份证号11010519491231002X，请核对", "zh", "身份证号[ID]，请核对"),
    ("id 11010519491231002x.", "en", "id [ID]."),
    ("卡号4111 1111 1111 1111有效", "zh", "卡号[CARD]有效"),
    ("amex 378282246310005", "en", "amex [CARD]"),
    ("登录192.168.1.20，再登录8.8.8.8。", "zh", "登录[IP]，再登录[IP]。"),
    ("The server 10.0.0.1.", "en", "The server [IP]."),
]
KEPT = [
    ("升级到1.2.3.45.6版", "zh"),
    ("version 1.2.3.4 is out", "en"),
    ("v1.2.3.4", "en"),
    ("版本：1.2.3.4", "zh"),
    ("256.1.1.1 and 1.2.3 and 127.0.0.1", "en"),
    ("110105194912310021", "zh"),  # the check digit of the ID is wrong
    ("110105194913310027", "zh"),  # there is no thirteenth month
    ("4111 1111 1111 1112", "en"),  # Luhn fails
    ("pi is 3.14159265358979323846", "en"),
    ("2012年10月12日至2014年03月04日 13:00-14:00", "zh"),
    ("in 1998-2003, 10,000,000 of them", "en"),
    ("ISBN 978-7-111-12345-6", "zh"),
    ("order 20261122123456789", "en"),
    ("138123456789 is one digit too long", "en"),
    ("user@localhost and @name and a @ b", "en"),
    ("《刑法》第二百六十六条", "zh"),
    ("1 2 3 4 5 6 7 8 9 10 11 12", "en"),
]


@pytest.mark.parametrize(("text", "language", "masked"), MASKED)
def test_masked(text: str, language: str, masked: str) -> None:
    assert mask(text, language) == masked


@pytest.mark.parametrize(("text", "language"), KEPT)
def test_kept(text: str, language: str) -> None:
    assert mask(text, language) == text


def test_every_valid_id_card_is_found_and_every_other_check_digit_is_not() -> None:
    """Check digits computed here, by GB 11643-1999: Σ digit · 2^(17 - i) mod 11."""
    rng = random.Random(1)
    for _ in range(200):
        digits = (
            f"110105{rng.randint(1940, 2010)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}{rng.randint(0, 999):03d}"
        )
        total = sum(int(digit) * (2 ** (17 - i) % 11) for i, digit in enumerate(digits))
        check = "10X98765432"[total % 11]
        assert mask(f"证件{digits}{check}号", "zh", kinds=("id",)) == "证件[ID]号"
        wrong = "0" if check != "0" else "1"
        assert "[ID]" not in mask(f"证件{digits}{wrong}号", "zh", kinds=("id",))


def test_of_numbers_that_start_like_cards_only_those_with_the_luhn_digit_go() -> None:
    rng = random.Random(2)
    for _ in range(200):
        number = "62" + "".join(rng.choices("0123456789", k=16))
        total = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(reversed(number)))
        digit = str(-total % 10)
        for last in "0123456789":
            expected = "[CARD]" if last == digit else number + last
            assert mask(number + last, "zh", kinds=("card",)) == expected


def test_found_spans_are_ordered_and_do_not_overlap_and_are_counted_by_kind() -> None:
    text = "a@b.com 13812345678 8.8.8.8 11010519491231002X"
    counts = Counter[str]()
    assert mask(text, "zh", counts) == "[EMAIL] [PHONE] [IP] [ID]"
    assert counts == {"email": 1, "phone": 1, "ip": 1, "id": 1}
    spans = [(item.start, item.end) for item in find(text, "zh")]
    assert spans == sorted(spans) and all(a[1] <= b[0] for a, b in pairwise(spans))


@given(st.text(alphabet=st.sampled_from("张a@.1380８+-( )x:Z"), max_size=60), st.sampled_from(["", "en", "zh"]))
def test_a_mask_leaves_everything_else_and_has_nothing_left_to_mask(text: str, language: str) -> None:
    found = find(text, language)
    rebuilt, at = "", 0
    for item in found:
        assert at <= item.start < item.end <= len(text)
        rebuilt += text[at : item.start] + MASKS[item.kind]
        at = item.end
    assert mask(text, language) == rebuilt + text[at:]


def test_the_step_masks_every_text_of_a_record_and_counts() -> None:
    call = json.dumps([{"name": "dial", "arguments": {"number": 13812345678}}])
    record = Conversation(
        (Message("user", "mail a@b.com"), Message("assistant", "ok", "c@d.org", call)),
        language="zh",
        meta={"by": "e@f.net"},
    )
    counts = Counter[str]()
    (masked,) = through(PII(), [record], counts)
    assert isinstance(masked, Conversation)
    assert masked.messages[0].content == "mail [EMAIL]"
    assert masked.messages[1].name == "[EMAIL]" and masked.meta == {"by": "[EMAIL]"}
    assert json.loads(masked.messages[1].tool_calls)[0]["arguments"] == {"number": "[PHONE]"}
    assert counts == {"pii/email": 3, "pii/phone": 1}

    preference = Preference((Message("user", "x@y.com"),), (Answer("8.8.8.8", 1), Answer("fine", 2)))
    (masked_preference,) = through(PII(kinds=("ip",)), [preference], counts)
    assert isinstance(masked_preference, Preference)
    assert [a.content for a in masked_preference.answers] == ["[IP]", "fine"]
    assert masked_preference.prompt[0].content == "x@y.com", "only the kinds asked for"
