"""Which language a text is in, short ones included."""

from __future__ import annotations

import pytest

from fledge.data.language import language_of
from fledge.data.steps import Language, Rejected
from fledge.records.kinds import Document

from .conftest import through


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("你好", "zh"),
        ("我用Python写代码，跑在Linux上。", "zh"),
        ("軟體開發與繁體中文", "zh"),
        ("こんにちは、元気ですか。", "ja"),
        ("日本語の文章には漢字もあります", "ja"),
        ("안녕하세요 반갑습니다", "ko"),
        ("What is the weather like today, my friend?", "en"),
        ("Hello how are you", "en"),
        ("Guten Tag, wie geht es Ihnen heute? Ich hoffe, gut.", "de"),
        ("Bonjour, comment allez-vous aujourd'hui mes amis ?", "fr"),
        ("", ""),
        ("12345 !!", ""),
    ],
)
def test_language_of(text: str, language: str) -> None:
    assert language_of(text) == language


def test_a_short_text_keeps_what_its_source_declares() -> None:
    assert language_of("hi\nhello?", "en") == "en", "left free, the classifier says Breton"
    long_german = "Das ist ein langer deutscher Satz, der keinen Zweifel an seiner Sprache lässt."
    assert language_of(long_german, "en") == "de"


def test_the_step_sets_the_language_and_refuses_others() -> None:
    german = "Das ist ein langer deutscher Satz, der keinen Zweifel an seiner Sprache lässt."
    kept, refused = through(Language(allowed=("en", "zh")), [Document("国家保护公民的合法权益。"), Document(german)])
    assert isinstance(kept, Document) and kept.language == "zh"
    assert refused == Rejected("language not asked for", "de")
