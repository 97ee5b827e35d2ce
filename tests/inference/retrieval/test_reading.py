"""Files as passages: whole sentences and characters, the headings above them, and the place where they stand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from fledge.data.mixing.chunking import inside_grapheme
from fledge.inference.retrieval.reading import Passage, headings, passages_of
from fledge.records.rejects import Rejects, read_rejects
from tests.inference.retrieval import library
from tests.records.test_files_books import pdf


def read(file: Path, size: int = 40, overlap: int = 0) -> list[Passage]:
    return list(passages_of(file, file.name, size, overlap))


def test_headings_of_both_languages_with_their_levels() -> None:
    text = "# A #\n##B\n## C  d\n```\n# no\n```\n第三章 借阅\nChapter 4 The End\n第二条 不是标题\nSection IV"
    assert [(level, name) for _, level, name in headings(text)] == [
        (1, "A"), (2, "C  d"), (2, "第三章 借阅"), (2, "Chapter 4 The End"), (3, "Section IV")
    ]  # fmt: skip
    assert all(text[at:].startswith(("#", "第", "C", "S")) for at, _, _ in headings(text))


def test_passages_of_markdown_know_their_lines_and_headings(tmp_path: Path) -> None:
    library.write(tmp_path / "lib")
    found = read(tmp_path / "lib" / "guide.md", size=30)
    boiler = next(p for p in found if "harbour workshop" in p.text)
    assert (boiler.where, boiler.heading) == ("guide.md#L7-L11", "House guide › Boiler")
    garden = next(p for p in found if "roses" in p.text)
    assert garden.text.startswith("## Garden") and garden.heading == "House guide"  # its own stands in its text
    lines = library.GUIDE.split("\n")
    for passage in found:
        first, _, last = passage.place.replace("L", "").partition("-")
        assert passage.text in "\n".join(lines[int(first) - 1 : int(last or first)])


def test_a_long_section_keeps_its_heading_in_every_passage(tmp_path: Path) -> None:
    file = tmp_path / "long.md"
    file.write_text("# 一\n\n## 甲\n\n" + "这是一个句子。" * 40 + "\n\n## 乙\n\n短。\n", encoding="utf-8")
    found = read(file, size=60)
    assert len(found) >= 5
    assert all(p.text.endswith("。") for p in found)
    middle = [p for p in found if "甲" not in p.text and "乙" not in p.text]
    assert middle and all(p.heading == "一 › 甲" for p in middle)
    assert found[-1].heading.startswith("一") and "乙" in found[-1].heading + found[-1].text


def test_chapters_go_on_across_the_pieces_of_a_long_text(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    body = "\n\n".join(f"Paragraph number {i} says what it says about the sea." for i in range(400))
    file.write_text(f"Chapter 7 The Sea\n\n{body}\n\nChapter 8 The Land\n\nOnly this.\n", encoding="utf-8")
    found = read(file, size=50)
    assert {p.heading for p in found[1:-2]} == {"Chapter 7 The Sea"}
    lines = file.read_text().split("\n")
    assert all(p.text.startswith(lines[int(p.place[1:].split("-")[0]) - 1]) for p in found)


@pytest.mark.parametrize("text", ["👩‍👩‍👧‍👦🇩🇪é" * 30, "한국어" * 40, "不断句的汉字" * 30])
def test_no_character_is_ever_cut(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    found = read(file, size=9)
    assert "".join(p.text for p in found) == text
    end = 0
    for passage in found[:-1]:
        end += len(passage.text)
        assert not inside_grapheme(text, end)


def test_overlap_repeats_whole_sentences(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("".join(f"第{i:02d}句说了一些话。" for i in range(30)), encoding="utf-8")
    found = read(file, size=40, overlap=12)
    for before, after in pairwise(found):
        assert after.text.startswith("第") and after.text[:10] in before.text
    assert "第29句" in found[-1].text


def test_pages_rows_and_web_pages_have_places_of_their_own(tmp_path: Path) -> None:
    lib = library.write(tmp_path / "lib")
    (lib / "book.pdf").write_bytes(pdf("The first page", "The second page is about owls", title="Owls"))
    pages = read(lib / "book.pdf")
    assert [(p.place, p.heading) for p in pages] == [("page=1", "Owls"), ("page=2", "Owls")]
    rows = read(lib / "museum.jsonl")
    assert [p.where for p in rows] == ["museum.jsonl#L1", "museum.jsonl#L2"]
    assert rows[1].heading == "博物馆" and "票价" not in rows[1].text
    (page,) = read(lib / "lighthouse.html", size=200)
    assert "297" not in page.text and "two hundred" in page.text and "Home" not in page.text
    assert page.text.startswith("The lighthouse of Amrum\n") and page.heading == ""  # the title, and not twice
    assert page.where == "lighthouse.html"


def test_what_cannot_be_read_is_kept_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": 5}\nnot json\n', encoding="utf-8")
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    (tmp_path / "bytes.txt").write_bytes(b"fine\n" + b"\xff\xfe broken\n")
    with Rejects(tmp_path / "out") as rejects:
        found = [
            p for f in ("rows.jsonl", "bad.pdf", "bytes.txt") for p in passages_of(tmp_path / f, f, 40, 0, rejects)
        ]
    assert [p.text for p in found] == ["good", "fine"]
    kept = [(row["where"], row["reason"]) for row in read_rejects(tmp_path / "out")]
    assert [where for where, _ in kept] == ["rows.jsonl:2", "rows.jsonl:3", "bad.pdf", "bytes.txt:2"]
    assert all(reason for _, reason in kept)
