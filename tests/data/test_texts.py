"""Units, and changing every text of every kind of record."""

from __future__ import annotations

import json

from fledge.data.texts import letters, map_texts, units
from fledge.records.kinds import (
    Answer,
    Conversation,
    Document,
    Labelled,
    Message,
    Preference,
    Prompt,
    Rating,
    Record,
    texts,
)

USER = (Message("user", "q"),)
EVERY_KIND: list[Record] = [
    Document("q"),
    Labelled("q", "label"),
    Conversation((*USER, Message("assistant", "q"))),
    Prompt(USER, "q"),
    Rating(USER, "q", 1.0),
    Preference(USER, (Answer("q", 1, "a"), Answer("q", 2, "b"))),
]


def test_units_are_words_in_english_and_characters_in_chinese() -> None:
    assert units("It's 2 cats, OK?") == ["it", "s", "2", "cats", "ok"]
    assert units("学习PyTorch框架！") == ["学", "习", "pytorch", "框", "架"]
    assert units("ＡＢＣ　１２３") == ["abc", "123"], "full width counts as narrow"
    assert units("…—？") == []


def test_units_of_equal_texts_in_two_unicode_forms_are_equal() -> None:
    assert units("café") == units("cafe\u0301")


def test_letters_counts_every_script_and_no_digit() -> None:
    assert letters("ab 12 中文 é_") == 5


def test_map_texts_reaches_every_text_of_every_kind() -> None:
    for record in EVERY_KIND:
        changed = map_texts(record, str.upper)
        assert set(texts(changed)) == {"Q"}, type(record).__name__
        assert changed.id == record.id
        assert type(changed) is type(record)
    assert map_texts(EVERY_KIND[3], str.upper).answer == "Q"  # type: ignore[union-attr]


def test_map_texts_gives_back_the_same_object_where_nothing_changes() -> None:
    for record in EVERY_KIND:
        assert map_texts(record, lambda text: text) is record


def test_everywhere_reaches_meta_names_and_labels_and_leaves_tool_calls_json() -> None:
    call = json.dumps([{"name": "dial", "arguments": {"number": 5550, "to": ["bob"], "nested": '{"to": "bob"}'}}])
    record = Conversation((Message("assistant", "bob", "bob", call),), meta={"author": "bob"})

    def change(text: str) -> str:
        return "X" if text in ("bob", "5550") else text

    changed = map_texts(record, change, everywhere=True)
    message = changed.messages[0]
    assert (message.content, message.name, changed.meta["author"]) == ("X", "X", "X")
    arguments = json.loads(message.tool_calls)[0]["arguments"]
    assert arguments == {"number": "X", "to": ["X"], "nested": '{"to": "X"}'}
    assert map_texts(record, change).messages[0].tool_calls == call, "only everywhere"
