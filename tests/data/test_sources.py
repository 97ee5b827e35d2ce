"""Dumps, papers, feeds, forums and code as records; what each reader sets aside, and why."""

from __future__ import annotations

import bz2
import gzip
import json
import random
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

import fledge.data.collect as collecting
from fledge.core.errors import FledgeError
from fledge.data.sources import reader_for
from fledge.data.sources.latex import plain_latex
from fledge.data.sources.wikipedia import plain_wikitext
from fledge.data.stages import Collect
from fledge.records.kinds import Conversation, Document
from fledge.records.rejects import read_rejects
from fledge.records.shards import read

from .conftest import Runner


def documents(made: Any) -> list[Document]:
    return list(read(made, "documents"))  # type: ignore[arg-type]


def conversations(made: Any) -> list[Conversation]:
    return list(read(made, "conversations"))  # type: ignore[arg-type]


def refused(made: Any) -> list[tuple[str, str]]:
    return [(row["reason"], row["value"]) for row in read_rejects(made.path)]


def test_a_reader_is_chosen_by_name_and_first_bytes(tmp_path: Path) -> None:
    for name, content, wanted in (
        ("a.tex", b"", "latex"), ("a.rss", b"", "feed"), ("a.xml", b'<?xml version="1.0"?><rss version="2.0">', "feed"),
        ("b.xml", b'<feed xmlns="http://www.w3.org/2005/Atom">', "feed"), ("c.xml", b"<config/>", ""),
        ("w.xml.bz2", bz2.compress(b'<mediawiki xml:lang="zh">'), "wikipedia"),
        ("p.xml", b"\n<posts>", "stackexchange"),
        ("t.jsonl", b'{"id": 1, "parent_id": null, "text": "x"}\n', "threads"), ("m.jsonl", b'{"messages": []}\n', ""),
        ("x.xml.gz", b"no gzip", ""), ("a.txt", b"<rss", ""),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert reader_for(tmp_path / name) == wanted, name


# --- feeds ----------------------------------------------------------------------------------------------------------

RSS = """<?xml version="1.0" encoding="UTF-8"?>
<rss version="2.0" xmlns:content="http://purl.org/rss/1.0/modules/content/"><channel><title>News</title>
<language>zh-cn</language>
<item><title>Owls &amp; more</title><link>http://x.org/1</link><guid>1</guid>
<pubDate>Fri, 02 Jan 2026 03:04:05 GMT</pubDate>
<description>Short.</description>
<content:encoded><![CDATA[<p>The whole <b>story</b>.</p><p>第二段。</p>]]></content:encoded>
</item>
<item><title>Only a title</title><link>http://x.org/2</link></item>
<item><title>Twice</title><link>http://x.org/1</link><guid>1</guid><description>Again.</description></item>
</channel></rss>"""
ATOM = """<feed xmlns="http://www.w3.org/2005/Atom" xml:lang="en"><title>Blog</title>
<entry><title>A</title><id>urn:a</id><link href="http://x.org/a"/><updated>2026-01-02T00:00:00Z</updated>
<author><name>Writer</name></author><summary>Only a summary.</summary></entry></feed>"""


def test_the_entries_of_feeds(tmp_path: Path, run: Runner) -> None:
    (tmp_path / "a.xml").write_text(RSS, encoding="utf-8")
    (tmp_path / "b.atom").write_text(ATOM, encoding="utf-8")
    made = run(Collect(kind="documents", sources=[str(tmp_path / "a.xml"), str(tmp_path / "b.atom")]))
    one, two = documents(made)
    assert one.text == "The whole story.\n\n第二段。" and one.language == "zh"
    assert one.meta == {"url": "http://x.org/1", "title": "Owls & more", "date": "Fri, 02 Jan 2026 03:04:05 GMT"}
    assert two.text == "Only a summary." and two.meta["author"] == "Writer"
    assert refused(made) == [("the entry has no text", ""), ("the entry stands twice in the feed", "1")]


def test_a_feed_that_is_none(tmp_path: Path, run: Runner) -> None:
    (tmp_path / "a.rss").write_text("<html>not found</html>")
    with pytest.raises(FledgeError):
        run(Collect(kind="documents", sources=[str(tmp_path / "a.rss")]))
    with pytest.raises(FledgeError, match="holds documents where conversations are wanted"):
        run(Collect(kind="conversations", sources=[str(tmp_path / "a.rss")]))


# --- Wikipedia ------------------------------------------------------------------------------------------------------


def page(number: int, title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    moved = f'<redirect title="{redirect}" />' if redirect else ""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns><id>{number}</id>{moved}"
        f'<revision><id>{number}00</id><text xml:space="preserve">{escaped}</text></revision></page>'
    )


HEAD = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="zh"><siteinfo>'
    "<sitename>Wikipedia</sitename><base>https://zh.wikipedia.org/wiki/Wikipedia:首页</base></siteinfo>"
)


def test_the_articles_of_a_dump(tmp_path: Path, run: Runner) -> None:
    pages = [
        page(
            1,
            "猫头鹰",
            "'''猫头鹰'''是[[鸟纲|鸟]]。<ref>某书</ref>{{taxobox|a=b}}\n== 习性 ==\n* 夜行\n[[Category:鸟]]",
        ),
        page(2, "Talk:猫头鹰", "讨论", namespace=1),
        page(3, "鸮", "#重定向 [[猫头鹰]]", redirect="猫头鹰"),
        page(4, "空", "{{stub}}"),
        page(5, "软 件", "-{zh-tw:軟體;zh-cn:软件}-是程序。"),
    ]
    file = tmp_path / "zhwiki-20260101-pages-articles.xml.bz2"
    file.write_bytes(bz2.compress((HEAD + "".join(pages) + "</mediawiki>").encode()))
    made = run(Collect(kind="documents", sources=[str(file)]))
    owl, software = documents(made)
    assert owl.text == "猫头鹰\n\n猫头鹰是鸟。\n\n习性\n\n- 夜行" and (owl.id, owl.language) == ("1", "zh")
    assert owl.meta == {"title": "猫头鹰", "revision": "100", "url": "https://zh.wikipedia.org/wiki/猫头鹰"}
    assert software.text == "软 件\n\n软件是程序。" and software.meta["url"].endswith("/软_件")
    assert refused(made) == [("is not an article", "namespace 1"), ("is a redirect", ""), ("holds no text", "")]


def test_a_dump_that_breaks_off_keeps_its_whole_pages(tmp_path: Path, run: Runner) -> None:
    whole = (HEAD + "".join(page(i, f"T{i}", f"Text number {i}. " * 40) for i in range(300))).encode()
    (tmp_path / "a.xml").write_bytes(whole[:100_000])
    (tmp_path / "b.xml.gz").write_bytes(gzip.compress(whole)[:1_500])
    made = run(Collect(kind="documents", sources=[str(tmp_path)]))
    assert 100 < len(documents(made)) < 400 and all(d.text.endswith(".") for d in documents(made))
    assert [reason for reason, _ in refused(made)] == [
        "is not valid XML from here on", "the file breaks off: what comes from here on cannot be unpacked"
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dump_of_many_streams_is_read_in_spans(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    pages = [page(i, f"T{i}", f"Text {random.Random(i).random()} of number {i}. " * 20) for i in range(200)]
    groups = ["".join(pages[at : at + 10]) for at in range(0, 200, 10)]
    file = tmp_path / "zhwiki-20260101-pages-articles1.xml-p1p200.bz2"
    file.write_bytes(b"".join(bz2.compress(part.encode()) for part in (HEAD, *groups, "</mediawiki>")))
    whole = documents(run(Collect(kind="documents", sources=[str(file)])))
    monkeypatch.setattr(collecting, "UNIT_BYTES", file.stat().st_size // 9)
    monkeypatch.setattr(collecting, "WORTH", 0)
    made = run(Collect(kind="documents", sources=[str(file)]), workers=workers)
    assert documents(made) == whole and len(whole) == 200 and not refused(made)
    assert whole[-1].language == "zh" and whole[-1].meta["url"].endswith("/T199")
    assert len(list((run.home / "work2/collect").iterdir())) > 5 and made.metrics["files"] == 1


def test_a_page_without_end_is_given_up(tmp_path: Path, run: Runner) -> None:
    good = [page(i, f"T{i}", "Good text. " * 90) for i in range(400)]  # together more than one page may have
    content = HEAD + "".join(good) + page(400, "Two", "x" * 400_000)
    (tmp_path / "a.xml").write_text(content, encoding="utf-8")
    made = run(Collect(kind="documents", sources=[str(tmp_path / "a.xml")], max_row=50_000))
    assert [d.id for d in documents(made)] == [str(i) for i in range(400)]
    assert [reason for reason, _ in refused(made)] == ["is longer than a row may be"]


def test_wikitext_as_plain_text() -> None:
    assert (
        plain_wikitext(
            "{{Infobox|a={{b}}}}\n'''Owls''' are [[bird]]s of the [[Strigiformes|order]].<ref name=a/>\n\n"
            "=== Places ===\n* [[File:x.jpg|thumb|An [[owl]]]]Woods\n** Old ones\n# First\n"
            "{|\n|-\n| cell\n|}\nSee [http://x.org the site]&nbsp;now.<!-- no --> <math>x^2</math><br/>End.\n__NOTOC__"
        )
        == "Owls are birds of the order.\n\nPlaces\n\n- Woods\n- Old ones\n- First\n\nSee the site now.\nEnd."
    )


# --- LaTeX ----------------------------------------------------------------------------------------------------------

MAIN = r"""\documentclass{article} % a comment
\usepackage{amsmath}
\title{On \emph{Owls}}
\begin{document}
\maketitle
We say 5\% of $x_1^2$ is enough \cite{a,b}.% gone
\section{Method}\label{sec:m}
\input{parts/method}
\include{missing}
\begin{figure}\includegraphics{a.png}\caption{No.}\end{figure}
\begin{equation} E = mc^2 \end{equation}
\bibliography{refs}
\end{document}
after the end
"""


def test_a_paper_with_its_parts(tmp_path: Path, run: Runner) -> None:
    folder = tmp_path / "paper"
    (folder / "parts").mkdir(parents=True)
    (folder / "main.tex").write_text(MAIN)
    (folder / "parts/method.tex").write_text("We \\textbf{listen}, 中文也可以.\n\\input{more}\n\\input{../main}")
    (folder / "parts/more.tex").write_text("At night.\\input{../../secret}")
    (tmp_path / "secret.tex").write_text("outside of the source")
    made = run(Collect(kind="documents", sources=[str(folder)]))
    (document,) = documents(made)
    assert document.meta == {"title": "On Owls", "file": "main.tex"}
    flat = " ".join(document.text.split())
    assert flat == (
        "On Owls We say 5% of $x_1^2$ is enough. Method We listen, 中文也可以. At night. "
        r"\begin{equation} E = mc^2 \end{equation}"
    )
    assert refused(made) == [
        ("a part is missing", "../../secret"), ("a part is missing", "../main"), ("a part is missing", "missing"),
        ("is a part of another file (no \\documentclass)", ""), ("is a part of another file (no \\documentclass)", ""),
    ]  # fmt: skip


def test_latex_as_plain_text() -> None:
    assert plain_latex(
        r"See \url{http://x.org} and \href{http://y.org}{this}~\citep[p.~3]{me}. Caf\'e---\unknown{kept}"
    ) == ("See http://x.org and this. Café—kept")
    assert plain_latex(r"\begin{itemize}\item one\item two\footnote{no}\end{itemize}").split("\n") == ["- one", "- two"]
    for broken in (r"\begin{a} x $ y", "}}} x", r"\frac{1}", "$" * 99):
        plain_latex(broken)  # tolerant: no error


# --- forums ---------------------------------------------------------------------------------------------------------


def posts(*rows: dict[str, str]) -> str:
    body = "".join("<row " + " ".join(f"{k}={quoteattr(v)}" for k, v in row.items()) + " />\n" for row in rows)
    return f'<?xml version="1.0" encoding="utf-8"?>\n<posts>\n{body}</posts>'


def test_questions_with_their_accepted_or_best_answer(tmp_path: Path, run: Runner) -> None:
    (tmp_path / "Posts.xml").write_text(
        posts(
            {"Id": "1", "PostTypeId": "1", "AcceptedAnswerId": "4", "Score": "7", "Title": "How do owls hunt?",
             "Body": "<p>At <em>night</em>?</p>", "Tags": "<birds><night-life>", "CreationDate": "2026-01-02"},
            {"Id": "3", "PostTypeId": "2", "ParentId": "1", "Score": "99", "Body": "<p>Loudly.</p>"},
            {"Id": "4", "PostTypeId": "2", "ParentId": "1", "Score": "2",
             "Body": "<p>Silently:</p><pre>fly()\n  now()</pre>"},
            {"Id": "5", "PostTypeId": "1", "Score": "1", "Title": "哪里有猫头鹰？", "Body": "<p>想看。</p>"},
            {"Id": "6", "PostTypeId": "2", "ParentId": "5", "Score": "0", "Body": "<p>动物园。</p>"},
            {"Id": "7", "PostTypeId": "2", "ParentId": "5", "Score": "3", "Body": "<p>森林。</p>"},
            {"Id": "8", "PostTypeId": "1", "Score": "1", "Title": "Unanswered", "Body": "<p>?</p>"},
            {"Id": "9", "PostTypeId": "1", "Score": "1", "Title": "Badly answered", "Body": "<p>?</p>"},
            {"Id": "10", "PostTypeId": "2", "ParentId": "9", "Score": "-4", "Body": "<p>No.</p>"},
            {"Id": "11", "PostTypeId": "5", "Body": "<p>A wiki.</p>"},
            {"Id": "12", "PostTypeId": "2", "ParentId": "777", "Score": "1", "Body": "<p>Lost.</p>"},
        ),
        encoding="utf-8",
    )  # fmt: skip
    made = run(Collect(kind="conversations", sources=[str(tmp_path / "Posts.xml")]))
    one, two = conversations(made)
    assert [(m.role, m.content) for m in one.messages] == [
        ("user", "How do owls hunt?\n\nAt night?"), ("assistant", "Silently:\n\n```\nfly()\n  now()\n```"),
    ]  # fmt: skip
    assert one.id == "1" and one.meta == {
        "title": "How do owls hunt?", "score": "7", "answer_score": "2", "answer": "accepted",
        "tags": "birds night-life", "date": "2026-01-02",
    }  # fmt: skip
    assert two.messages[1].content == "森林。" and two.meta["answer"] == "best"
    assert sorted(refused(made)) == [
        ("answers a question that is not there", "777"), ("has no answer", ""), ("has no good answer", "-4"),
        ("is neither a question nor an answer", "type 5"),
    ]  # fmt: skip
    assert len(documents(run(Collect(kind="documents", sources=[str(tmp_path / "Posts.xml")])))) == 2


def test_threads_follow_the_best_answer_whatever_the_order(tmp_path: Path, run: Runner) -> None:
    rows: list[Any] = [
        {"id": "c", "parent_id": "a", "author": "y", "text": "The worse answer.", "score": 1},
        {"id": "a", "parent_id": None, "author": "x", "text": "Who is awake?", "title": "Night", "score": 5},
        {"id": "d", "parent_id": "t1_b", "author": "x", "body": "Thanks."},
        {"id": "e", "parent_id": "d", "author": "x", "text": "A lot."},
        {"id": "b", "parent_id": "t3_a", "author": "z", "text": "Owls.", "score": 9},
        {"id": "f", "parent_id": None, "author": "x", "text": "Nobody answers."},
        {"id": "g", "parent_id": "zzz", "author": "x", "text": "Lost."},
        {"id": "h", "parent_id": "a", "author": "x", "text": "[deleted]"},
        {"id": "i", "parent_id": "a"},
        {"id": "j", "parent_id": "k", "author": "x", "text": "a circle"},
        {"id": "k", "parent_id": "j", "author": "x", "text": "a circle"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]), encoding="utf-8")
    made = run(Collect(kind="conversations", sources=[str(tmp_path / "t.jsonl")]))
    (thread,) = conversations(made)
    assert [(m.role, m.content) for m in thread.messages] == [
        ("user", "Night\n\nWho is awake?"), ("assistant", "Owls."), ("user", "Thanks.\n\nA lot."),
    ]  # fmt: skip
    assert thread.meta == {"title": "Night", "score": "5", "authors": "2"}
    assert sorted(reason.partition(":")[0] for reason, _ in refused(made)) == [
        "answers a post that is not there", "has no answer", "has no text", "is not valid JSON", "was taken away",
    ]  # fmt: skip


# --- code -----------------------------------------------------------------------------------------------------------

MIT = "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy\nof this software …"


def test_a_repository_is_what_somebody_wrote_in_it(tmp_path: Path, run: Runner) -> None:
    files: dict[str, str | bytes] = {
        ".git/config": "[core]", "LICENSE": MIT, "src/owl.py": "def hunt():\r\n    return 'night'\n",
        "src/夜.go": "package night // 夜里\n", "Makefile": "all:\n\techo hi\n",
        "README.md": "# Owls\n" + "word " * 300,
        "logo.png": b"\x89PNG", "data.bin.py": b"\x00\x01", "empty.py": "\n", "node_modules/x/i.js": "let a = 1;\n",
        "app.min.js": "var a=1", "poetry.lock": "x", "api_pb2.py": "x = 1\n",
        "made.go": "// Code generated by protoc. DO NOT EDIT.\npackage x\n",
        "table.py": "T = [" + "1, " * 2_000 + "]\n", "gbk.c": "int main() { /* 猫头鹰在夜里捕猎 */ }\n".encode("gbk"),
        "build/lib/owl.py": "x = 1\n", "symbols.js": "{}();[]\n" * 30,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    made = run(Collect(kind="documents", sources=[str(tmp_path / "repo")]))
    found = {document.meta["path"]: document for document in documents(made)}
    assert {path: document.meta["code"] for path, document in found.items()} == {
        "Makefile": "Makefile", "README.md": "Markdown", "gbk.c": "C", "src/owl.py": "Python", "src/夜.go": "Go",
    }  # fmt: skip
    assert found["src/owl.py"].text == "def hunt():\n    return 'night'\n" and "猫头鹰" in found["gbk.c"].text
    assert all(d.meta["license"] == "MIT" and d.meta["license_file"] == "LICENSE" for d in found.values())
    why = {row["where"]: (row["reason"], row["value"]) for row in read_rejects(made.path)}
    assert why == {
        "LICENSE": ("is not source code", "LICENSE"), "logo.png": ("is not source code", ".png"),
        "data.bin.py": ("is binary, or in no known encoding", ""), "empty.py": ("is empty", ""),
        "node_modules/x/i.js": ("is vendored", "node_modules"), "app.min.js": ("is minified", ""),
        "poetry.lock": ("is generated", "poetry.lock"), "api_pb2.py": ("is generated", "api_pb2.py"),
        "made.go": ("is generated", "Code generated by"), "build/lib/owl.py": ("was built", "build"),
        "table.py": ("has a line that nobody wrote by hand", "6006 characters"),
        "symbols.js": ("is data rather than code", "0.00 letters and digits"),
    }  # fmt: skip


def test_a_glob_is_code_where_it_is_said(tmp_path: Path, run: Runner) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(FledgeError, match="holds no data file"):
        run(Collect(kind="documents", sources=[str(tmp_path / "*.py")]))
    (document,) = documents(run(Collect(kind="documents", sources=[str(tmp_path / "*.py")], code=True)))
    assert document.meta["path"].endswith("a.py") and document.meta["code"] == "Python"
