"""Files as passages: every format that `fledge.records` reads, cut between paragraphs and sentences, with headings.

A passage knows where it stands in its file, in the spelling that browsers and code hosts use behind a `#`: `L12-L18`
for lines, `L17` for a row of a table, `page=3` of a PDF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.core.artifact import digest_of
from fledge.core.errors import FledgeError, need
from fledge.data.mixing.chunking import cut, measure_for
from fledge.records.formats import STEP, detect
from fledge.records.kinds import Conversation, Document, as_document
from fledge.records.raw.files import rows_of
from fledge.records.raw.packed import is_packed, suffix_of
from fledge.records.rejects import Rejects
from fledge.records.values import Misfit

_LINES = (".txt", ".md")
_PAGES = (".html", ".htm", ".xhtml")
_FENCE = re.compile(r"\s*(?:```|~~~)")
_MARKED = re.compile(r"(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
_CHINESE = re.compile(r"[ \t\u3000]*第[〇零一二三四五六七八九十百千0-9]+([编編部卷章篇回节])(?:[ \t\u3000].{0,40})?$")
_ENGLISH = re.compile(r"(part|chapter|section) (?:[0-9]+|[ivxlc]+)\b.{0,60}$", re.IGNORECASE)
_LEVELS = {
    "编": 1,
    "編": 1,
    "部": 1,
    "卷": 1,
    "part": 1,
    "章": 2,
    "篇": 2,
    "回": 2,
    "chapter": 2,
    "节": 3,
    "section": 3,
}


@dataclass(frozen=True)
class Passage:
    """A piece of a text. `score` is how well it answers a query, where it was found by one: higher is better."""

    text: str
    source: str
    """the file, relative to the folder that was indexed, `/` between the parts"""
    place: str = ""
    """where in the file: lines, a row, a page"""
    heading: str = ""
    """the headings it stands under, the outermost first: `Guide › Installing`"""
    score: float = 0.0

    @property
    def where(self) -> str:
        """`guide.md#L12-L18`."""
        return f"{self.source}#{self.place}" if self.place else self.source

    @property
    def searched(self) -> str:
        """What is searched: the headings and the text."""
        return f"{self.heading}\n{self.text}" if self.heading else self.text

    @property
    def key(self) -> str:
        """A digest of what is searched: equal passages have equal words and vectors."""
        return digest_of(self.searched)


@dataclass(frozen=True)
class Text:
    """A text of a file and where it stands there."""

    text: str
    title: str = ""
    line: int = 0
    """number of its first line in the file; 0 where the file's lines are not the text's"""
    place: str = ""
    """where the whole of it stands, where lines say nothing"""


def passages_of(file: Path, source: str, size: int, overlap: int, rejects: Rejects | None = None) -> Iterator[Passage]:
    """A file's passages of at most `size` units (words, or single characters of Chinese), `overlap` of which may stand
    in two. What cannot be read of the file goes to `rejects`."""
    path: list[tuple[int, str]] = []  # the headings in force go on from one text of a file of lines to the next
    for text in texts_of(file, source, rejects):
        found = headings(text.text)
        if not text.line:
            path = [(0, text.title)] if text.title else []
        done = 0
        for start, end in cut(text.text, size, overlap, measure_for("units")):
            body = text.text[start:end].strip()
            first = start + len(text.text[start:end]) - len(text.text[start:end].lstrip())
            while done < len(found) and found[done][0] <= first:
                path = entered(path, *found[done][1:])
                done += 1
            own = done > 0 and found[done - 1][0] == first  # a heading that begins the passage stands in its text
            own = own or (bool(path) and body.split("\n", 1)[0].strip() == path[-1][1])  # as the title of a web page
            shown = path[:-1] if own else path
            if body:
                yield Passage(body, source, _place(text, first, end), " › ".join(name for _, name in shown))
        for _, level, name in found[done:]:
            path = entered(path, level, name)


def headings(text: str) -> list[tuple[int, int, str]]:
    """(where its line begins, level from 1, what it says) of each heading: `## …`, 第三章 …, Chapter 3 …; none in
    fenced code."""
    found: list[tuple[int, int, str]] = []
    at, fenced = 0, False
    for line in text.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and (match := _MARKED.match(line)):
            found.append((at, len(match[1]), match[2]))
        elif not fenced and (match := _CHINESE.match(line) or _ENGLISH.match(line)):
            found.append((at, _LEVELS[match[1].lower()], " ".join(line.split())))
        at += len(line) + 1
    return found


def entered(path: list[tuple[int, str]], level: int, name: str) -> list[tuple[int, str]]:
    """The headings in force behind one more: those of its own level and below it are over."""
    return [*(outer for outer in path if outer[0] < level), (level, name)]


def _place(text: Text, start: int, end: int) -> str:
    if not text.line:
        return text.place
    first = text.line + text.text.count("\n", 0, start)
    last = text.line + text.text.count("\n", 0, len(text.text[:end].rstrip()))
    return f"L{first}" if last <= first else f"L{first}-L{last}"


def texts_of(file: Path, source: str, rejects: Rejects | None = None) -> Iterator[Text]:
    """All texts of a file. What cannot be read is kept in `rejects` with its reason; no file stops the others."""

    def reject(where: str, reason: str, found: str = "", row: str = "") -> None:
        if rejects is not None:
            rejects.add(STEP, reason, found, row=row, where=source + where.removeprefix(file.name))

    suffix = suffix_of(file)
    try:
        if suffix == ".pdf" and not is_packed(file):
            yield from _pages(file, reject)
            return
        form = None if suffix in (*_LINES, *_PAGES) else detect(file, "documents")
        for row in rows_of(file):
            if row.error:
                reject(row.where, row.error.said("en"), row.found, row.text)
            elif suffix in _LINES:
                yield Text(str(row.value), line=int(row.where.rpartition(":")[2]))
            elif form is None:
                if text := _of_page(str(row.value["text"])):
                    yield text
                else:
                    reject(row.where, "no main text")
            else:
                try:
                    record = form.record(row.value)
                except Misfit as misfit:
                    reject(row.where, misfit.reason.said("en"), row.found, row.text)
                    continue
                document = as_document(record) if isinstance(record, Conversation) else record
                assert isinstance(document, Document)
                yield _of_document(document, _row(row.where.removeprefix(file.name)))
    except FledgeError as error:
        reject("", "; ".join(problem.what for problem in error.problems))


def _of_page(html: str, place: str = "") -> Text | None:
    from fledge.data.extract import extract

    text, title = extract(html)
    return Text(text, title, place=place) if text else None


def _of_document(document: Document, place: str) -> Text:
    if document.meta.get("format") == "html" and (page := _of_page(document.text, place)):
        return page
    return Text(document.text, document.meta.get("title", ""), place=place)


def _row(where: str) -> str:
    """`:17` (a line) and `[3]` (an item) as places."""
    number = re.sub(r"\D", "", where)
    return f"{'L' if where.startswith(':') else 'row='}{number}" if number else ""


def _pages(file: Path, reject: Any) -> Iterator[Text]:
    """A PDF's pages, each a text of its own, so that a passage can name its page."""
    from fledge.records.raw.books import pages_of

    pypdfium2 = need("pypdfium2", "data")
    try:
        book = pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        reject("", "is locked by a password" if "password" in str(error).lower() else "is not a valid PDF")
        return
    try:
        title = (book.get_metadata_dict(skip_empty=True) or {}).get("Title", "")
        empty = True
        for number, page in enumerate(pages_of(book), 1):
            if page:
                empty = False
                yield Text(page, title, place=f"page={number}")
        if empty:
            reject("", "holds no text (a scan?)", f"{len(book)} pages")
    except pypdfium2.PdfiumError as error:
        reject("", "is not a valid PDF", str(error))
    finally:
        book.close()
