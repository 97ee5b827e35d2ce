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
