"""Main text out of HTML: pages with gold text, beside trafilatura, and what pages do to break an extractor."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pytest

from fledge.data.extract import extract, extract_with_trafilatura
from fledge.data.steps import Extract, Rejected
from fledge.records.kinds import Document

from .conftest import talk, through
from .pages import pages

PAGES = pages()


def f1(found: str, gold: str) -> float:
    """Of the bags of words, and of single characters where there are no spaces."""
    a, b = Counter(_tokens(found)), Counter(_tokens(gold))
    shared = (a & b).total()
    return 2 * shared / max(1, a.total() + b.total())


def _tokens(text: str) -> list[str]:
    apart = "".join(f" {c} " if unicodedata.east_asian_width(c) == "W" else c for c in text)
    return apart.replace("|", " ").replace("- ", " ").split()


@pytest.mark.parametrize("name", PAGES)
def test_the_text_of_a_page_is_found_and_hardly_anything_else(name: str) -> None:
    page, gold, title = PAGES[name]
    text, said = extract(page)
    assert f1(text, gold) > 0.85, text
    assert said == title


def test_f1_beside_trafilatura() -> None:
    trafilatura = pytest.importorskip("trafilatura")
    scores: dict[str, list[float]] = {"fast": [], "trafilatura": [], "trafilatura, favouring nothing": []}
    for page, gold, _ in PAGES.values():
        scores["fast"].append(f1(extract(page)[0], gold))
        scores["trafilatura"].append(f1(extract_with_trafilatura(page)[0], gold))
        scores["trafilatura, favouring nothing"].append(
            f1(trafilatura.extract(page, include_comments=False) or "", gold)
        )
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    print({name: round(mean, 4) for name, mean in means.items()}, f"on {len(PAGES)} pages")
    best = max(mean for name, mean in means.items() if name != "fast")
    assert len(PAGES) >= 20 and means["fast"] > 0.9 and means["fast"] >= best - 0.02, means


def test_lists_code_tables_and_headings_stay_readable() -> None:
    page, _, _ = PAGES["documentation: Grandfather's lentil soup"]
    assert "- 300 grams of brown lentils, washed twice\n- two carrots" in extract(page)[0]
    code = extract(PAGES["blog: Reading a file line by line"][0])[0]
    assert 'with open("notes.txt", encoding="utf-8") as file:\n    for number, line' in code, "indented as it was"
    assert "Mode | Meaning\nr | read text, the default" in code
    assert "\n\nWhat you need to begin\n\n- A soldering iron" in extract(PAGES["blog: Why we repair old radios"][0])[0]


def test_what_is_beside_the_text_is_left_out() -> None:
    for name, (page, _, _) in PAGES.items():
        text = extract(page)[0]
        for phrase in ("cookies to improve", "Great post", "All rights reserved", "hidden from every", "only a script",
                       "ICP备", "路人甲", "隐藏的", "扫码关注", "建议使用", "Created using Sphinx"):  # fmt: skip
            assert phrase not in text, (name, phrase)


PARAGRAPH = "This is a paragraph of the article itself, and it is long enough to be taken for one, as you can see."


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("", ""),
        ("no tag at all, but a sentence.", "no tag at all, but a sentence."),
        ("<p>so <b>bold <i>both</b> rest.</p><p>And a second one.", "so bold both rest.\n\nAnd a second one."),
        (f"<div class='page with-sidebar no-comments'><p>{PARAGRAPH}</p></div>", PARAGRAPH),
        (f"<body style='display:none'><p>{PARAGRAPH}</p></body>", PARAGRAPH),
        (f"<p>{PARAGRAPH}</p><div hidden><p>Not this sentence, though.</p></div>", PARAGRAPH),
        (f"<form><p>{PARAGRAPH}</p><input value=x></form>", PARAGRAPH),
        ("<p>第一段文字，写得足够长，可以单独成段。<br><br>　　第二段文字，也写得足够长了。</p>",
         "第一段文字，写得足够长，可以单独成段。\n\n第二段文字，也写得足够长了。"),
        ("<ul>" + "<li><a href=x>only links in here</a></li>" * 30 + "</ul>", ""),
        ("<div>" * 3_000 + "too deep to be text." + "</div>" * 3_000, ""),
        ("<p>a\x00b &amp; c&nbsp;d, in one sentence.</p>", "ab & c d, in one sentence."),
    ],
)  # fmt: skip
def test_pages_that_are_not_as_they_should_be(page: str, text: str) -> None:
    assert extract(page)[0] == text


def test_the_step_changes_pages_and_nothing_else() -> None:
    page, _, title = PAGES["news: City council votes to reopen the river baths"]
    rows = [
        Document(page, "a", "en", meta={"format": "html", "url": "https://a.example/1"}),
        Document("<p>a text about the tag p</p>", "b"),
        Document("<html><body><nav>Home</nav></body></html>", "c", meta={"format": "html"}),
    ]
    counts = Counter[str]()
    changed, same, refused = through(Extract(), rows, counts)
    assert isinstance(changed, Document) and changed.text == extract(page)[0]
    assert changed.meta == {"format": "text", "title": title, "url": "https://a.example/1"}
    assert (changed.id, changed.language) == ("a", "en") and same == rows[1]
    assert refused == Rejected("no main text", "") and counts["extract/pages"] == 2
    assert through(Extract(), [changed]) == [changed], "a second time changes nothing"
    assert through(Extract(), [talk("<p>hi</p>", "yes?")]) == [talk("<p>hi</p>", "yes?")]


def test_the_step_asks_trafilatura_where_told_to() -> None:
    pytest.importorskip("trafilatura")
    page = PAGES["blog: Why we repair old radios"][0]
    (made,) = through(Extract(engine="trafilatura"), [Document(page, meta={"format": "html"})])
    assert isinstance(made, Document) and made.text == extract_with_trafilatura(page)[0] != extract(page)[0]
