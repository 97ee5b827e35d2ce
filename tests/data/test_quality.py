"""Quality rules: each one breaks on a text made to break it, and good text in both languages passes all of them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fledge.data.measures import Measures
from fledge.data.quality import RULES, broken_rule
from fledge.data.steps import Quality, Rejected
from fledge.records.kinds import Answer, Conversation, Document, Message, Preference, Prompt

from .conftest import EN_WORDS, chinese, english, talk, through

EN = english(random.Random(0))
ZH = chinese(random.Random(0))

BREAKS = [
    ("too_short", "en", "The cat sat on the mat with that hat."),
    ("too_short", "zh", "国家保护公民的合法权益，不得侵犯。"),
    ("word_length", "en", " ".join(["internationalization", "of", "the", "counterrevolutionary"] * 20) + "."),
    ("letters", "en", EN + " 12 34 56 78" * 30 + "."),
    ("letters", "zh", ZH + "12 34 56 78 " * 30 + "。"),
    ("symbols", "en", EN + " #tag" * 40 + "."),
    ("bullets", "en", "\n".join(f"- {english(random.Random(i), 1)}" for i in range(12))),
    ("bullets", "zh", "\n".join(f"• {chinese(random.Random(i), 1)}" for i in range(1, 13))),
    ("ellipses", "en", "\n".join(english(random.Random(i), 1) + ".." for i in range(12))),
    ("stop_words", "en", "Lorem cats dogs birds fish. " * 3 + "Ships trains planes cars bikes roads walls doors. " * 6),
    ("stop_words", "zh", "".join(random.Random(3).choices("春夏秋冬山水花鸟鱼虫江河湖海", k=12)) * 12 + "。"),
    ("line_ends", "en", "\n".join(english(random.Random(i), 2)[:-1] for i in range(10))),
    ("line_ends", "zh", "\n".join(chinese(random.Random(i), 2)[:-1] for i in range(10))),
    ("short_lines", "en", "\n".join(f"It was the {word} of days." for word in [*EN_WORDS[:12], "last"])),
    ("short_lines", "zh", "\n".join(chinese(random.Random(i), 1)[-9:] for i in range(20))),
    ("repeated_lines", "en", "\n".join([english(random.Random(1), 2)] * 3 + [english(random.Random(2), 1)])),
    ("placeholder", "en", EN + "\nLorem ipsum dolor sit amet, consectetur."),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "language", "text"), BREAKS, ids=[f"{b[0]}-{b[1]}" for b in BREAKS])
def test_each_rule_breaks_on_its_text_and_not_when_skipped(rule: str, language: str, text: str) -> None:
    broken = broken_rule(text, language, frozenset(set(RULES) - {rule}))
    assert broken is not None and broken[0] == rule and broken[1]
    assert broken_rule(text, language, frozenset(RULES)) is None


def test_good_text_in_both_languages_passes_every_rule() -> None:
    for seed in range(20):
        assert broken_rule(english(random.Random(seed)), "en") is None
        assert broken_rule(chinese(random.Random(seed)), "zh") is None


def test_chinese_is_measured_in_characters_whatever_split_says() -> None:
    text = "\n".join(chinese(random.Random(i), 3) for i in range(5))
    assert len(text.split()) < 10, "a rule on words would refuse it"
    assert broken_rule(text, "zh") is None
    assert broken_rule(text, "") is None, "the script is enough"


def test_repetition_is_found_in_both_languages() -> None:
    en, zh = english(random.Random(5), 1), chinese(random.Random(5), 1)
    for text, language in ((en + " " + en + " " + EN[:100] + en, "en"), ((zh * 9) + ZH[:80] + "。", "zh")):
        broken = broken_rule(text, language)
        assert broken is not None and broken[0].startswith("repetition"), language


@pytest.mark.parametrize("n", [2, 3, 5])
def test_repeated_and_top_share_against_counting_by_hand(n: int) -> None:
    rng = random.Random(9)
    for kinds in (["a", "bb", "ccc", "dd", "e", "f"], list("人民法院审理案件")):
        words = rng.choices(kinds, k=60)
        m = Measures(" ".join(words))
        assert m.units == words
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        inside = {j for i, gram in enumerate(grams) if gram in grams[:i] for j in range(i, i + n)}
        total = sum(map(len, words))
        assert dict(m.repeated((n,)))[n] == pytest.approx(sum(len(words[j]) for j in inside) / total)
        assert dict(m.repeated((2, n)))[n] == dict(m.repeated((n,)))[n], "whatever sizes came before"
        counts = Counter(grams)
        most = max(counts.values())
        longest = max(len("".join(gram)) for gram, times in counts.items() if times == most)
        assert m.top(n) == pytest.approx(min(1, most * longest / total) if most > 2 else 0)


def test_lines_and_paragraphs_that_stood_before_are_counted_by_number_and_length() -> None:
    m = Measures("one\ntwo two\none\n\none\ntwo two\none\n\nthree")
    assert m.duplicate_lines == (4 / 7, (3 + 3 + 7 + 3) / (3 + 7 + 3 + 3 + 7 + 3 + 5))
    assert m.duplicate_paragraphs == (1 / 3, 15 / 35)
    assert Measures("").duplicate_lines == Measures("").duplicate_paragraphs == (0, 0)


def test_document_rules_do_not_touch_dialogues() -> None:
    for record in (talk("hi", "hello!"), talk("你好", "你好啊！"), Prompt((Message("user", "2+2=?"),), "4")):
        assert through(Quality(), [record]) == [record]
    assert isinstance(through(Quality(), [Document("hi", language="en")])[0], Rejected)


@pytest.mark.parametrize(
    ("rule", "record"),
    [
        ("empty_text", talk("hi", "  ")),
        ("no_answer", Conversation((Message("user", "is anybody there?"),))),
        ("repeated_turns", talk("again", "again", "again", "Again", "again", "again")),
        ("letters", talk("?????? !!!!! 1234567", "...")),
        ("one_character", talk("look", "wo" + "w" * 80)),
        ("same_answers", Preference((Message("user", "q"),), (Answer("yes", 1), Answer("yes ", 2)))),
    ],
)
def test_rules_of_dialogues(rule: str, record: Conversation | Preference) -> None:
    (refused,) = through(Quality(), [record])
    assert isinstance(refused, Rejected) and refused.reason == rule
    assert through(Quality(skip=(rule,)), [record]) == [record]


def test_a_turn_that_only_calls_a_tool_is_not_empty() -> None:
    record = Conversation(
        (Message("user", "weather in Paris?"), Message("assistant", "", tool_calls='[{"name": "w"}]'))
    )
    assert through(Quality(), [record]) == [record]


def test_unknown_rules_are_refused_with_the_near_one() -> None:
    with pytest.raises(ValueError, match="short_lines"):
        Quality(skip=("short_line",))
