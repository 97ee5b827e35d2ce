"""Cutting long documents: nothing lost, nothing too long, at the borders a reader would choose."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError
from fledge.core.recipe import from_values
from fledge.data.mixing.chunking import border_strengths, cut, inside_grapheme, measure_for, pieces_of
from fledge.data.texts import units
from fledge.data.tokens.packing import encode_plain
from fledge.data.tokens.stages import ChunkDocuments
from fledge.data.tokens.tokenizer import save_tokenizer, train_bpe
from fledge.records.kinds import Document, Labelled
from fledge.records.shards import ShardWriter, read

from .conftest import Runner, chinese, corpus, digests, english, talk, write

CLUSTERS = [
    "e\u0301",
    "👨‍👩‍👧",
    "🇨🇳",
    "🇨🇳🇩🇪",
    "👍🏽",
    "각",
    "\u1100\u1161\u11a8",
    "क्षि",
    "ะ",
    "❤️",
    "\r\n",
    "\u0308",
    "a\u200d",
    "你",
    "x",
    "。",
    ". ",
    "\n",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(CLUSTERS), max_size=30).map("".join), st.integers(1, 20))
def test_pieces_are_the_text_and_never_end_inside_a_grapheme(text: str, size: int) -> None:
    places = cut(text, size, 0, measure_for("characters"))
    assert "".join(text[a:b] for a, b in places) == text
    borders = {0, *(match.end() for match in regex.finditer(r"\X", text))}
    assert {b for place in places for b in place} <= borders
    longest = max((len(g) for g in regex.findall(r"\X", text)), default=0)
    assert all(b - a <= max(size, longest) for a, b in places)
    assert len(places) == 1 or all(a < b for a, b in places)


@pytest.mark.parametrize("text", ["👨‍👩‍👧", "🇨🇳🇩🇪", "e\u0301\u0323x", "각ᆨ", "👍🏽👍", "a\r\nb", "❤️‍🔥"])
def test_what_belongs_together_is_what_unicode_says(text: str) -> None:
    borders = {0, *(match.end() for match in regex.finditer(r"\X", text))}
    assert {at for at in range(len(text) + 1) if not inside_grapheme(text, at)} == borders


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab 你好。.\n，,"), max_size=200), st.integers(2, 40), st.data())
def test_pieces_hold_at_most_so_many_units_and_share_at_most_the_overlap(
    text: str, size: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, (size - 1) // 2))
    places = cut(text, size, overlap, measure_for("units"))
    assert places[0][0] == 0 and places[-1][1] == len(text)
    for (a, b), (c, d) in pairwise(places):
        assert a < c <= b < d, "on and on, without a gap"
        assert len(units(text[c:b])) <= overlap
    assert all(len(units(text[a:b])) <= size for a, b in places)


def test_headings_go_before_paragraphs_before_sentences() -> None:
    text = (
        "Ein Satz. Zwei Worte hier.\n\nNew paragraph it is. More of it.\n# Heading\nUnder the heading. And on and on."
    )
    strengths = border_strengths(text)
    place = text.index
    assert (
        strengths[place("# Heading")] > strengths[place("New")] > strengths[place("Zwei")] > strengths[place("Worte")]
    )
    (_, end), *_ = cut(text, 17, 0, measure_for("units"))
    assert text[end:].startswith("# Heading")
    (_, end), *_ = cut(text, 9, 0, measure_for("units"))
    assert text[end:].startswith("New paragraph")


def test_chinese_is_cut_at_its_sentences_chapters_and_clauses() -> None:
    text = "第一章 总则\n为了保护自然人，制定本法。国家保护个人信息。没有说完\n第二章 附则\n本法自公布之日起施行。"
    (_, end), *_ = cut(text, 40, 0, measure_for("units"))
    assert text[end:].startswith("第二章")
    sentence = "国家保护自然人的个人信息。”他说，任何组织不得侵害！（完）然后呢？"
    (start, end), *_ = cut(sentence, 14, 0, measure_for("units"))
    assert sentence[start:end] == "国家保护自然人的个人信息。”"
    clause = "任何组织和个人，都不得以任何方式侵害"
    (start, end), *_ = cut(clause, 10, 0, measure_for("units"))
    assert clause[start:end] == "任何组织和个人，"


def test_abbreviations_and_numbers_do_not_end_a_sentence() -> None:
    text = "Mr. Smith paid 3.50 to J. Doe. Then he left the house"
    strengths = border_strengths(text)
    assert [text[at:].split()[0] for at in range(len(text)) if strengths[at] == 3] == ["Then"]


def test_the_next_piece_begins_with_a_whole_sentence_of_the_one_before() -> None:
    rng = random.Random(0)
    for text in (english(rng, 30), chinese(rng, 30)):
        places = cut(text, 60, 28, measure_for("units"))
        assert len(places) > 4
        for (_, b), (c, _) in pairwise(places):
            assert c < b and (text[c - 1] in "。 " and text[c - 2 : c].strip()[-1:] in ".。")


@pytest.mark.parametrize("name", ["en", "zh"])
def test_tokens_are_counted_as_the_piece_alone_is_encoded(tmp_path: Path, name: str) -> None:
    tokenizer = train_bpe([d.text for d in corpus(1, 40)], 400)
    save_tokenizer(tokenizer, tmp_path / "t")
    text = "\n".join((english if name == "en" else chinese)(random.Random(i), 20) for i in range(3)) + "龘" * 30
    pieces = pieces_of(Document(text, "d"), 40, 10, "tokens", tmp_path / "t")
    counts = [len(ids) for ids in encode_plain(tokenizer, [piece.text for piece in pieces])]
    assert max(counts) <= 40 and sorted(counts)[len(counts) // 2] > 20
    assert pieces[0].text == text[: len(pieces[0].text)] and text.endswith(pieces[-1].text)


def test_a_character_of_more_tokens_than_a_piece_holds_is_a_piece(tmp_path: Path) -> None:
    save_tokenizer(train_bpe(["a"], 261), tmp_path / "t")
    assert [p.text for p in pieces_of(Document("龘龘a", "d"), 2, 0, "tokens", tmp_path / "t")] == ["龘", "龘", "a"]


def test_the_stage_keeps_short_documents_and_numbers_the_pieces(tmp_path: Path, run: Runner) -> None:
    rows = [Document("short one", "s", "en", "web", {"k": "v"}), *corpus(1, 20)]
    with ShardWriter(tmp_path / "a", "documents", 6) as writer:
        for row in rows:
            writer.write(row)
    data = Artifact(tmp_path / "a")
    made = run(ChunkDocuments(data="a", size=100), {"a": data})
    found = list(read(made, "documents"))
    assert found[0] == rows[0]
    texts: dict[str, str] = {}
    for piece in found[1:]:
        name, _, number = piece.id.partition("#")
        assert piece.meta["chunk"].startswith(f"{number}/") and len(units(piece.text)) <= 100
        texts[name] = texts.get(name, "") + piece.text
    assert texts == {row.id: row.text for row in rows[1:]}
    assert made.metrics["documents"] == 21 and made.metrics["cut"] == 20 and made.metrics["rows"] == len(found)
    again = run(ChunkDocuments(data="a", size=100), {"a": data}, workers=2)
    assert digests(again.path) == digests(made.path)


def test_conversations_become_documents_and_other_kinds_are_refused(tmp_path: Path, run: Runner) -> None:
    made = run(ChunkDocuments(data="a", size=4), {"a": write(tmp_path / "a", [talk("one two three.", "four five.")])})
    assert [row.text for row in read(made, "documents")] == ["one two three.\n", "four five."]
    with pytest.raises(FledgeError, match="cut into pieces"):
        run(ChunkDocuments(data="a", size=4), {"a": write(tmp_path / "b", [Labelled("text", "label")])})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"size": 10, "overlap": 5}, "less than half"),
        ({"size": 9, "by": "tokens"}, "by a tokenizer"),
        ({"size": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, keys: dict[str, object], said: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    stages = {"c": {"use": "data.chunk", "data": str(tmp_path / "a.txt"), **keys}}
    with pytest.raises(FledgeError, match=said):
        from_values({"name": "x", "stages": stages})
