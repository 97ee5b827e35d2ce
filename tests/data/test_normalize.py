"""Repairs of encoding and white space."""

from __future__ import annotations

from collections import Counter

import pytest

from fledge.data.steps import Normalize, Rejected
from fledge.data.steps.normalize import normalize
from fledge.records.kinds import Document

from .conftest import through


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("schÃ¶n", "schön"),
        ("你好，世界".encode().decode("latin-1"), "你好，世界"),
        ("cafe\u0301", "café"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a  \nb\t\n\n\n\n\nc", "a\nb\n\n\nc"),
        ("x\x00\x07y\u200bz\ufeff", "xyz"),
        ("“全角”，（标点）！１２３", "“全角”，（标点）！１２３"),
        ("family 👨‍👩‍👧 stays", "family 👨‍👩‍👧 stays"),
        ("  plain  ", "plain"),
        ("tab\tstays", "tab\tstays"),
    ],
)
def test_normalize(text: str, normal: str) -> None:
    assert normalize(text) == normal
    assert normalize(normal) == normal, "a second time changes nothing"


def test_the_step_refuses_what_has_neither_letter_nor_digit() -> None:
    counts = Counter[str]()
    assert through(Normalize(), [Document("!!! …… ？")], counts)[0] == Rejected("no letter and no digit", "!!! …… ？")
    kept = through(Normalize(), [Document("42")], counts)[0]
    assert isinstance(kept, Document)
    through(Normalize(), [Document("a\r\nb")], counts)
    assert counts["normalize/changed"] == 1


SIMPLIFIED = "国家保护公民的合法权益，任何组织和个人不得侵犯。我们在这里学习，也在这里工作。"
TRADITIONAL = "國家保護公民的合法權益，任何組織和個人不得侵犯。我們在這裡學習，也在這裡工作。"


@pytest.mark.parametrize(
    ("text", "encoding"), [(SIMPLIFIED, "gbk"), (SIMPLIFIED, "gb18030"), (TRADITIONAL, "gbk"), (TRADITIONAL, "big5")]
)
def test_chinese_bytes_read_as_latin_are_read_again(text: str, encoding: str) -> None:
    for wrong in ("latin-1", "sloppy-windows-1252"):
        assert normalize(text.encode(encoding).decode(wrong)) == text, wrong


@pytest.mark.parametrize(
    "text",
    [
        "Привет, как дела? Это русский текст для проверки".encode("koi8-r").decode("latin-1"),
        "Ελληνικά γράμματα για δοκιμή κειμένου εδώ".encode("iso-8859-7").decode("latin-1"),
        "이것은 한국어 문장입니다. 우리는 여기에 있습니다".encode("euc-kr").decode("latin-1"),
        "これは日本語の文章です。私たちはここにいます".encode("euc-jp").decode("latin-1"),
        "ÀÉÎÕÜßæøåçñ Übergrößenträger «naïve» façade — œuvre…",
        "ãããããã éééééé",
        "国家 ÖÐ¹úÈËÃñ",
    ],
)
def test_other_bytes_are_no_chinese(text: str) -> None:
    from fledge.data.steps.normalize import chinese_bytes

    assert chinese_bytes(text) == text


def test_full_width_forms_become_plain_where_asked() -> None:
    (made,) = through(Normalize(form="nfkc"), [Document("Ｆｕｌｌ　ｗｉｄｔｈ：１２３，ﬁn，①")])
    assert isinstance(made, Document) and made.text == "Full width:123,fin,1"


def test_script_is_converted_in_chinese_rows_only() -> None:
    pytest.importorskip("opencc")
    japanese = "日本語の學習と勉強はここでします。"
    rows = [
        Document(SIMPLIFIED, language="zh"),
        Document(SIMPLIFIED),
        Document(japanese),
        Document(SIMPLIFIED, language="ja"),
    ]
    texts = [r.text for r in through(Normalize(script="traditional"), rows) if isinstance(r, Document)]
    assert texts[0] == texts[1] != SIMPLIFIED and "國家保護公民的合法權益" in texts[0]
    assert texts[2:] == [japanese, SIMPLIFIED]
    (back,) = through(Normalize(script="simplified"), [Document(TRADITIONAL, language="zh")])
    assert isinstance(back, Document) and back.text == SIMPLIFIED
