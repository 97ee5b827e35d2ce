"""Citations in an answer, checked: does the passage exist, do quotations stand in it, do its words bear the sentence?

Full-width brackets and marks of quotation count as well: 根据资料［1］、【2】，“……”.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from fledge.inference.retrieval.reading import Passage
from fledge.inference.retrieval.words import words

_MARK = re.compile(r"[\[［【]\s*(\d{1,3}(?:\s*[,，、;；]\s*\d{1,3}|\s*[-–—~～]\s*\d{1,3})*)\s*[\]］】]")
_PART = re.compile(r"(\d+)(?:\s*[-–—~～]\s*(\d+))?")
_QUOTE = re.compile(r"\"([^\"\n]*)\"|“([^“”\n]*)”|「([^「」\n]*)」|『([^『』\n]*)』")
_SHORT = 3  # characters: so little between quotation marks is a word that is named, not a quotation
_END = re.compile(r"(?<=[。！？!?…])[”’」』）》]*|(?<=\.)[\"'”’)\]]*(?=\s|$)|\n+")
_BEHIND = 12  # characters after a quotation in which its citation is looked for
_MOST = 20  # numbers of one range: [1-999] is no list of sources


@dataclass(frozen=True)
class Citation:
    """A number in the answer: `answer[start:end]` is the mark in which it stands."""

    number: int
    start: int
    end: int
    exists: bool


@dataclass(frozen=True)
class Quote:
    """Words between quotation marks, the passages cited right behind them, and those in which they do stand."""

    text: str
    cited: tuple[int, ...]
    found: tuple[int, ...]

    @property
    def verified(self) -> bool:
        """Whether it stands word for word in a passage that it cites; in any, where it cites none."""
        return bool(set(self.cited) & set(self.found) if self.cited else self.found)


@dataclass(frozen=True)
class Claim:
    """A sentence of the answer with what it cites. `support`: the share of its words that stand in those passages."""

    text: str
    cited: tuple[int, ...]
    support: float


def citations(answer: str, count: int) -> list[Citation]:
    """Every number that an answer cites, of `count` passages that are numbered from 1."""
    found = []
    for match in _MARK.finditer(answer):
        found += [Citation(number, *match.span(), 1 <= number <= count) for number in _numbers(match[1])]
    return found


def marked(answer: str, count: int) -> str:
    """The answer with a question mark at every number that no passage has: `[7?]`."""

    def mark(match: re.Match[str]) -> str:
        numbers = _numbers(match[1])
        if all(1 <= number <= count for number in numbers):
            return match[0]
        return "[" + ", ".join(f"{n}" if 1 <= n <= count else f"{n}?" for n in numbers) + "]"

    return _MARK.sub(mark, answer)


def without_marks(answer: str) -> str:
    """The answer alone: no citations, nor the spaces before them."""
    return re.sub(rf"[ \t]*{_MARK.pattern}", "", answer).strip()


def quotes(answer: str, passages: Sequence[Passage]) -> list[Quote]:
    """Every quotation of an answer and where it stands, white space, width, case and outer marks left aside."""
    texts = [_plain(passage.searched) for passage in passages]
    found = []
    for match in _QUOTE.finditer(answer):
        quoted = next(group for group in match.groups() if group is not None)
        wanted = _plain(quoted).strip(" .,;:!?…")
        if len(wanted) <= _SHORT - (not wanted.isascii()):
            continue
        behind = answer[match.end() : match.end() + _BEHIND]
        mark = _MARK.search(behind)
        cited = tuple(_numbers(mark[1])) if mark and not re.search(r"[\n\"“「『]", behind[: mark.start()]) else ()
        holds = tuple(number for number, text in enumerate(texts, 1) if wanted and wanted in text)
        found.append(Quote(quoted, cited, holds))
    return found


def claims(answer: str, passages: Sequence[Passage]) -> list[Claim]:
    """The sentences of an answer, each with the passages it cites and how far their words bear it out.

    A citation behind the full stop belongs to the sentence before it: `It is blue. [2]`.
    """
    held = [set(words(passage.searched)) for passage in passages]
    found = []
    for sentence in _sentences(answer):
        cited = tuple(dict.fromkeys(n for match in _MARK.finditer(sentence) for n in _numbers(match[1])))
        own = set(words(_MARK.sub(" ", sentence)))
        if own:
            there = set().union(*(held[n - 1] for n in cited if 1 <= n <= len(held)))
            found.append(Claim(sentence.strip(), cited, len(own & there) / len(own)))
    return found


def _sentences(answer: str) -> list[str]:
    """Sentences; one that is nothing but a citation is put to the one before it."""
    joined: list[str] = []
    start = 0
    for end in [*(match.end() for match in _END.finditer(answer)), len(answer)]:
        sentence, start = answer[start:end], max(start, end)
        if not sentence.strip():
            continue
        if joined and (lead := re.match(rf"\s*(?:{_MARK.pattern}\s*)+[.。]?", sentence)):
            joined[-1] += lead[0]
            sentence = sentence[lead.end() :]
        if sentence.strip():
            joined.append(sentence)
    return joined


def _numbers(inside: str) -> list[int]:
    """`1, 3-5` → 1, 3, 4, 5."""
    numbers: list[int] = []
    for match in _PART.finditer(inside):
        first, last = int(match[1]), int(match[2] or match[1])
        numbers += range(first, last + 1) if first <= last < first + _MOST else [first, last]
    return list(dict.fromkeys(numbers))


def _plain(text: str) -> str:
    """Folded, and without white space between Chinese characters, where it says nothing."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"(?<=[^\x00-\x7f]) | (?=[^\x00-\x7f])", "", text)
