"""Long documents cut at sensible borders: before a heading, between paragraphs, lines, sentences, clauses, words.

A piece is as long as it may be, ends at the strongest border of its second half, and where there are several of that
strength at the last one. Chinese is cut like English: its sentences end with 。！？ and its words need no spaces. Where
there is no border at all, a piece ends between two characters as people see them: never inside a base letter with its
accents, a family of emoji, a flag, or a Hangul syllable.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.workers import spread
from fledge.data.inputs import Rows, made_once, rows_of, set_aside
from fledge.data.passes import ROWS, write_table
from fledge.data.texts import UNSPACED
from fledge.data.tokens.packer import one_thread, plain_of
from fledge.records.kinds import Conversation, Document, as_document, from_row, schema, to_row
from fledge.records.shards import ShardWriter

_UNIT = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_NOT_AN_END = "".join(rf"(?<!\b{word})" for word in ("Mr", "Mrs", "Ms", "Dr", "St", "No", "vs", "cf", "[A-Z]"))
_BORDERS = (  # from the weakest to the strongest: a piece may end where the match ends
    re.compile(r"\s+"),
    re.compile(r"[，、：；]+[”’」』）》]*\s*|[,;:]+[\"'”’)\]]*\s+"),
    re.compile(rf"[。！？…]+[”’」』）》]*\s*|{_NOT_AN_END}[.!?]+[\"'”’)\]]*\s+"),
    re.compile(r"\n"),
    re.compile(r"\n[ \t\u3000]*\n\s*?(?=\S|\Z)"),
    re.compile(
        r"(?m)^(?=#{1,6} |[ \t\u3000]*第[〇零一二三四五六七八九十百千0-9]+[章节編编部篇回卷]"
        r"|(?:chapter|part|section) [0-9ivxlc]+\b|\\(?:chapter|(?:sub)*section)\b)",
        re.I,
    ),
)
SENTENCE = 3  # the strength of the end of a sentence: its place in `_BORDERS`, from 1


@dataclass(frozen=True)
class Chunking:
    """One row group of documents to cut."""

    rows: Rows
    kind: str
    size: int
    overlap: int
    by: str
    tokenizer: Path | None
    folder: Path


def chunk_corpus(data: Artifact, size: int, overlap: int, by: str, tokenizer: Path | None, job: Job) -> dict[str, Any]:
    """Cut the documents of a corpus that are longer than `size`; write all below `job.out`. Returns the metrics."""
    kind, chunks = rows_of(data, job.work / "raw", job.events.progress)
    if kind not in ("documents", "conversations"):
        raise FledgeError(
            Problem(t("only documents and conversations can be cut into pieces"), str(data.path), found=kind)
        )
    works = [
        Chunking(chunk, kind, size, overlap, by, tokenizer, job.work / "pieces" / f"{number:06d}")
        for number, chunk in enumerate(chunks)
    ]
    for done, _ in enumerate(spread(chunk_rows, works, job.execution), 1):
        job.events.progress(done, len(works), "share")
    total: Counter[str] = Counter()
    with ShardWriter(job.out, "documents") as writer:
        for work in works:
            total.update(chunk_rows(work))
            writer.write_table(Rows(work.folder / ROWS).read("documents"))
    counts = {key: total[key] for key in ("rows", "bytes", "documents", "cut")}
    return {**counts, "rejected": set_aside([job.work / "raw"], job.out)}


def chunk_rows(work: Chunking) -> dict[str, Any]:
    """Cut the documents of one row group, unless it is done; the pieces lie in `rows.arrow`."""
    import pyarrow as pa

    def make(folder: Path) -> dict[str, Any]:
        made, cut, size = [], 0, 0
        with one_thread():
            for row in work.rows.read(work.kind).to_pylist():
                record = from_row(work.kind, row)
                document = as_document(record) if isinstance(record, Conversation) else record
                assert isinstance(document, Document)
                pieces = pieces_of(document, work.size, work.overlap, work.by, work.tokenizer)
                made += [to_row(piece) for piece in pieces]
                cut += len(pieces) > 1
                size += sum(len(piece.text.encode()) for piece in pieces)
        write_table(pa.Table.from_pylist(made, schema=schema("documents")), folder / ROWS)
        return {"documents": work.rows.count, "rows": len(made), "cut": cut, "bytes": size}

    return made_once(work.folder, make)


def pieces_of(
    document: Document, size: int, overlap: int = 0, by: str = "units", tokenizer: Path | None = None
) -> list[Document]:
    """The document, or its pieces: `id#1`, `id#2`, … with `chunk: 1/7` in their `meta`."""
    places = cut(document.text, size, overlap, measure_for(by, tokenizer))
    if len(places) == 1:
        return [document]
    return [
        Document(
            document.text[start:end], f"{document.id}#{number}", document.language, document.source,
            {**document.meta, "chunk": f"{number}/{len(places)}"},
        )
        for number, (start, end) in enumerate(places, 1)
    ]  # fmt: skip


Measure = Callable[[str], NDArray[np.int64]]
"""Where each unit of length of a text begins, rising."""


def measure_for(by: str, tokenizer: Path | None = None) -> Measure:
    """`characters`, `units` (words and unspaced characters of the text as it stands), or `tokens` of a tokenizer."""
    if by == "characters":
        return lambda text: np.arange(len(text))
    if by == "units":
        return lambda text: np.fromiter((m.start() for m in _UNIT.finditer(text)), dtype=np.int64)
    assert tokenizer is not None
    backend = plain_of(tokenizer)

    def tokens(text: str) -> NDArray[np.int64]:
        return np.array([start for start, _ in backend.encode(text, add_special_tokens=False).offsets], dtype=np.int64)

    return tokens


def cut(text: str, size: int, overlap: int, measure: Measure) -> list[tuple[int, int]]:
    """(start, end) of pieces of at most `size` units of length each, of which up to `overlap` stand in two.

    Without overlap the pieces follow one another without a gap. (A single character of more than `size` tokens is a
    piece nonetheless.)
    """
    begins = measure(text)
    if len(begins) <= size:
        return [(0, len(text))]
    strengths = border_strengths(text)

    def place(number: int) -> int:
        return int(begins[number]) if number < len(begins) else len(text)

    pieces, start = [], 0
    while True:
        first, room = int(np.searchsorted(begins, start)), size
        while True:
            limit = place(first + room)
            end = limit
            if end < len(text):
                end = _best(strengths, max(start, place(first + room // 2)), limit)
            while end > start and inside_grapheme(text, end):
                end -= 1
            end = end if end > start else _grapheme_after(text, start)
            over = len(measure(text[start:end])) - size if room else 0
            if over <= 0:  # tokens may fall otherwise when a piece stands alone
                break
            room = max(0, room - over)
        pieces.append((start, end))
        if end == len(text):
            return pieces
        start = max(_overlapped(text, strengths, begins, end, overlap), _grapheme_after(text, start))


def border_strengths(text: str) -> NDArray[np.int8]:
    """(len + 1,) how good a border stands before each character: 0 none, 6 a heading."""
    strengths = np.zeros(len(text) + 1, dtype=np.int8)
    for strength, border in enumerate(_BORDERS, 1):
        strengths[np.fromiter((match.end() for match in border.finditer(text)), dtype=np.int64)] = strength
    return strengths


def _best(strengths: NDArray[np.int8], low: int, high: int) -> int:
    """The last of the strongest borders in (low, high]; `high` where there is none."""
    inside = strengths[low + 1 : high + 1]
    if len(inside) and (strongest := inside.max()):
        return low + 1 + int(np.flatnonzero(inside == strongest)[-1])
    return high


def _overlapped(text: str, strengths: NDArray[np.int8], begins: NDArray[np.int64], end: int, overlap: int) -> int:
    """Where the piece behind `end` begins: at the first sentence (or else word) of the last `overlap` units."""
    if not overlap:
        return end
    low = int(begins[max(0, int(np.searchsorted(begins, end)) - overlap)])
    for least in (SENTENCE, 1):
        if len(found := np.flatnonzero(strengths[low:end] >= least)):
            return low + int(found[0])
    while low < end and inside_grapheme(text, low):
        low += 1
    return low


def _grapheme_after(text: str, start: int) -> int:
    start += 1
    while start < len(text) and inside_grapheme(text, start):
        start += 1
    return start


def inside_grapheme(text: str, at: int) -> bool:
    """Whether the characters before and behind a place belong together (the main rules of UAX #29)."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if before == "\r" and after == "\n":
        return True
    if before in "\r\n" or after in "\r\n":
        return False
    if (
        unicodedata.category(after) in ("Mn", "Me", "Mc")
        or after in "\u200c\u200d"
        or "\U0001f3fb" <= after <= "\U0001f3ff"
    ):
        return True
    if before == "\u200d" and unicodedata.category(after) == "So":
        run = at - 1
        while run > 0 and (unicodedata.category(text[run - 1]) in ("Mn", "Me") or _is_skin(text[run - 1])):
            run -= 1
        return run > 0 and unicodedata.category(text[run - 1]) == "So"
    if unicodedata.combining(before) == 9 and unicodedata.category(after) == "Lo":  # a conjunct of an Indic script
        return True
    if _is_flag_letter(before) and _is_flag_letter(after):
        run = at
        while run > 0 and _is_flag_letter(text[run - 1]):
            run -= 1
        return (at - run) % 2 == 1
    return _hangul(before, after)


def _is_skin(character: str) -> bool:
    return "\U0001f3fb" <= character <= "\U0001f3ff"


def _is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _hangul(before: str, after: str) -> bool:
    """Leading consonants, vowels and trailing consonants of one syllable."""

    def kind(c: str) -> str:
        if "\u1100" <= c <= "\u115f":
            return "L"
        if "\u1160" <= c <= "\u11a7":
            return "V"
        if "\u11a8" <= c <= "\u11ff":
            return "T"
        if "\uac00" <= c <= "\ud7a3":
            return "LV" if (ord(c) - 0xAC00) % 28 == 0 else "LVT"
        return ""

    follows = {"L": ("L", "V", "LV", "LVT"), "V": ("V", "T"), "LV": ("V", "T"), "T": ("T",), "LVT": ("T",)}
    return kind(after) in follows.get(kind(before), ())
