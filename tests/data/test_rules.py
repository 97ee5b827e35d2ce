"""Gopher, C4 and FineWeb as steps of their own: each rule by name and value, thresholds by language, addresses,
density."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from fledge.data.chunk import Chunk
from fledge.data.density import compressed, distinct
from fledge.data.measures import Measures
from fledge.data.quality import c4_clean, sentences
from fledge.data.steps import (
    URL,
    C4Quality,
    Density,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Rejected,
    Step,
    read_step,
    write_step,
)
from fledge.data.texts import units
from fledge.records.kinds import Document

from .conftest import chinese, english, talk, through


def lines(seed: int, language: str = "en", count: int = 8) -> list[str]:
    make = english if language == "en" else chinese
    return [make(random.Random(seed + i), 2) for i in range(count)]


def paragraphs(*parts: str) -> str:
    return "\n\n".join(parts)


EN, ZH = "\n\n".join(lines(0)), "\n\n".join(lines(0, "zh"))
BREAKS: list[tuple[Step, str, str, str]] = [
    (GopherRepetition(), "en", "duplicate_paragraphs", paragraphs(*lines(0), *["Read more here."] * 6)),
    (GopherRepetition(), "en", "duplicate_paragraph_characters", paragraphs(*lines(0), *lines(0)[:3])),
    (GopherRepetition(), "zh", "duplicate_lines", "\n".join([*lines(0, "zh"), *["阅读更多"] * 6])),
    (GopherRepetition(), "zh", "duplicate_line_characters", "\n".join([*lines(0, "zh"), *lines(0, "zh")[:3]])),
    (GopherRepetition(), "en", "top 2-gram", EN + " buy shoes" * 60),
    (GopherRepetition(), "zh", "top 4-gram", ZH + "买鞋子吧" * 40),
    (GopherRepetition(), "en", "repeated 5-grams", "\n".join(f"{i} " + english(random.Random(3), 3) for i in range(6))),
    (
        GopherRepetition(),
        "zh",
        "repeated 10-grams",
        "\n".join(f"{i} " + chinese(random.Random(3), 3) for i in range(6)),
    ),
    (GopherQuality(), "en", "too_short", "Too short by far."),
    (GopherQuality(), "zh", "letters", ZH + "12 34 56 " * 60),
    (GopherQuality(), "en", "symbols", EN + " #tag" * 50),
    (GopherQuality(), "zh", "ellipses", "\n".join(line[:-1] + "……" for line in lines(0, "zh"))),
    (GopherQuality(), "zh", "stop_words", "春夏秋冬山水花鸟" * 20),
    (FineWebQuality(), "en", "line_ends", "\n".join(line[:-1] for line in lines(0))),
    (FineWebQuality(), "zh", "short_lines", "\n".join(line[:8] + "。" for line in lines(0, "zh", 12))),
    (FineWebQuality(), "en", "repeated_lines", "\n".join([*lines(0), lines(0)[0]])),
    (FineWebQuality(max_short=1), "en", "line_breaks", "\n".join(["one. two."] + [f"w{i}." for i in range(80)])),
    (C4Quality(), "en", "sentences", "One sentence of some words. And another one of them."),
    (C4Quality(), "zh", "sentences", "只有这么一句话。再加上另外一句话。"),
    (C4Quality(), "en", "curly_bracket", EN + "\n\nif (x) { return y; }"),
    (C4Quality(), "en", "placeholder", EN + "\n\nLorem ipsum dolor sit amet."),
]


@pytest.mark.parametrize(
    ("step", "language", "rule", "text"), BREAKS, ids=[f"{b[0].name}-{b[2]}-{b[1]}" for b in BREAKS]
)
def test_each_rule_refuses_with_its_name_and_value(step: Step, language: str, rule: str, text: str) -> None:
    (refused,) = through(step, [Document(text, language=language)])
    assert isinstance(refused, Rejected) and refused.reason == rule and refused.value
    skipping = step.model_copy(update={"skip": (rule.split(" ")[0],)})
    (other,) = through(skipping, [Document(text, language=language)])
    assert not isinstance(other, Rejected) or other.reason.split(" ")[0] != rule.split(" ")[0]


def test_good_text_in_both_languages_passes_all_four() -> None:
    rows = [Document(EN, "en", "en"), Document(ZH, "zh", "zh"), Document(ZH, "unnamed")]
    for step in (GopherRepetition(), GopherQuality(), C4Quality(), FineWebQuality()):
        assert through(step, rows) == rows, step.name


def test_dialogues_are_no_documents() -> None:
    for step in (GopherRepetition(), GopherQuality(), C4Quality(), FineWebQuality()):
        assert through(step, [talk("hi", "hello {name}")]) == [talk("hi", "hello {name}")]


def test_thresholds_are_options_for_all_languages_or_for_one() -> None:
    rows = [
        Document("Nine words are too few for a document, surely.", language="en"),
        Document("十个字太短了吧。", language="zh"),
    ]
    assert [isinstance(r, Rejected) for r in through(GopherQuality(), rows)] == [True, True]
    low = GopherQuality(min_units=5, min_stop_words=0)
    assert through(low, rows) == rows
    chinese_only = GopherQuality(min_units={"zh": 5}, min_stop_words={"zh": 0})
    assert [isinstance(r, Rejected) for r in through(chinese_only, rows)] == [True, False]
    top = GopherRepetition(top={"zh": {1: 0.01}})
    good = [Document(EN, language="en"), Document(ZH, language="zh")]
    assert [isinstance(r, Rejected) for r in through(top, good)] == [False, True]
    assert read_step(write_step(top)) == top, "and can be read back"


def test_a_step_says_which_rules_there_are() -> None:
    with pytest.raises(ValueError, match="short_lines"):
        FineWebQuality(skip=("short_line",))
    with pytest.raises(ValueError, match="min_unit"):
        read_step({"gopher_quality": {"min_unit": 3}})


def test_all_steps_of_a_chunk_share_one_set_of_measures() -> None:
    chunk = Chunk.of("documents", [Document(EN, language="en"), Document(ZH, language="zh")])
    words = chunk.of_each(units)
    for step in (GopherRepetition(), GopherQuality(), FineWebQuality()):
        chunk, refused = step(chunk, Counter())
        assert not refused
    assert all(m.units is w for m, w in zip(chunk.of_each(Measures), words, strict=True))


def test_c4_takes_lines_out_and_leaves_the_rest_as_it_is() -> None:
    kept = [*lines(0), "A heading without an end"]
    out = ["Please enable JavaScript to read.", "Read our privacy policy.", "We use cookies, as all do.", "Two words",
           "x" * 1001 + " is a word that nobody wrote"]  # fmt: skip
    (made,) = through(C4Quality(), [Document("\n".join([kept[0], *out, *kept[1:]]), language="en")])
    assert isinstance(made, Document) and made.text == "\n".join(kept)
    (ended,) = through(C4Quality(ended=True), [Document("\n".join(kept), language="en")])
    assert isinstance(ended, Document) and ended.text == "\n".join(kept[:-1])
    chinese_lines = [*lines(0, "zh"), "标题没有句号"]
    junk = ["版权所有 示例网", "京ICP备00000000号", "请阅读隐私政策。", "顶"]
    assert c4_clean("\n".join([*junk, *chinese_lines]), 3, False) == "\n".join(chinese_lines)
    assert c4_clean("As said[12] before[citation needed], it holds[edit].", 3, False) == "As said before, it holds."


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 0),
        ("One. Two! Three?", 3),
        ("No end", 1),
        ("第一句。第二句！“第三句？”第四句", 4),
        ("Version 1.2.3 is out.", 1),
    ],
)
def test_sentences(text: str, number: int) -> None:
    assert sentences(text) == number


def test_pages_go_by_their_address(tmp_path: Path) -> None:
    hosts, words = tmp_path / "hosts", tmp_path / "words"
    hosts.write_text("# blocked\n0.0.0.0 ads.example\nbad.example  # and all below it\n例子.测试\n", encoding="utf-8")
    words.write_text("casino\n", encoding="utf-8")
    step = URL(domains=("evil.example",), domain_list=str(hosts), word_list=str(words), soft_words=("hot", "free", "now"), parts=("赌场",))  # fmt: skip  # noqa: E501
    addresses = {
        "https://good.example/a": None,
        "https://evil.example/": ("blocked domain", "evil.example"),
        "http://www.EVIL.example:8080/x": ("blocked domain", "evil.example"),
        "https://notevil.example/": None,
        "https://a.b.bad.example/x": ("blocked domain", "bad.example"),
        "https://ads.example/": ("blocked domain", "ads.example"),
        "https://xn--fsqu00a.xn--0zwm56d/": ("blocked domain", "xn--fsqu00a.xn--0zwm56d"),
        "https://good.example/Casino-royale": ("blocked word in the address", "casino"),
        "https://good.example/casinos": None,
        "https://good.example/hot-air": None,
        "https://good.example/hot/free": ("several soft words in the address", "free hot"),
        "https://good.example/%E8%B5%8C%E5%9C%BA": ("blocked part of the address", "赌场"),
        "http://[broken": ("address that cannot be read", "http://[broken"),
        "": None,
    }
    rows = [Document("text", str(i), meta={"url": url} if url else {}) for i, url in enumerate(addresses)]
    counts = Counter[str]()
    for row, result, (url, verdict) in zip(rows, through(step, rows, counts), addresses.items(), strict=True):
        assert result == (Rejected(*verdict) if verdict else row), url
    assert counts["url/without address"] == 1
    (by_source,) = through(step, [Document("text", source="https://evil.example/page")])
    assert isinstance(by_source, Rejected)


def test_density_tells_repetition_and_noise_from_prose() -> None:
    rng = random.Random(4)
    noise = "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(600))
    said = {
        "says the same again and again": Document(chinese(rng, 1) * 30, language="zh"),
        "noise": Document(noise, language="zh"),
        "few different words": Document(
            " ".join(rng.choices(["buy", "sell", "cheap", "shoes", "now"], k=300)), language="en"
        ),
    }
    results = through(Density(least=0.2), [said["few different words"]])
    assert isinstance(results[0], Rejected) and results[0].reason == "few different words"
    for reason in ("says the same again and again", "noise"):
        (refused,) = through(Density(), [said[reason]])
        assert isinstance(refused, Rejected) and refused.reason == reason, refused
    assert through(Density(least=0, most={"zh": 9}, most_distinct=1), [said["noise"]]) == [said["noise"]]


def test_density_hardly_depends_on_length() -> None:
    import pydoc_data.topics as manual

    text = " ".join(sorted(manual.topics.values(), key=len)[-5:])
    whole = compressed(text, "en")
    for size in (300, 600, 1200, 5000):
        parts = [compressed(text[at : at + size], "en") for at in range(0, 15_000, size)]
        assert sum(parts) / len(parts) == pytest.approx(whole, rel=0.15), size
    assert compressed("", "en") == compressed("hi", "zh") == 1
    assert distinct([]) == 1 and distinct(["a"] * 50) == 1 / 50
    assert distinct([*"abcd"] * 100) == 4 / 100
