"""Normalisation: mojibake put right, one Unicode form, one kind of line end, no invisible characters."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from fledge.data.chunk import Chunk
from fledge.data.steps.base import Refused, Rejected, Step

_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u200b\u2060\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
_TRAILING = re.compile(r"[ \t]+(?=\n|$)")
_MANY_LINES = re.compile(r"\n{4,}")


def normalize(text: str) -> str:
    """The text as it was meant. “”, full-width punctuation and emoji (with their joiners) stay as they are."""
    if text.isascii():
        if text.isprintable():  # one line of plain ASCII, as most turns of a chat are
            return text.strip()
    else:
        import ftfy
        from ftfy.badness import is_bad

        text = _line_ends(text)
        if is_bad(text):  # UTF-8 read as Latin-1 and the like (Speer, 2019)
            text = ftfy.fix_encoding(text)
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
    text = _INVISIBLE.sub("", _line_ends(text))
    return _MANY_LINES.sub("\n\n\n", _TRAILING.sub("", text)).strip()


def _line_ends(text: str) -> str:
    return (
        text.replace("\r\n", "\n")
        .replace("\r", "\n")
        .replace("\u2028", "\n")
        .replace("\u2029", "\n\n")
        .replace("\x85", "\n")
    )


class Normalize(Step, name="normalize"):
    """Repairs encoding and white space of every text; a record left without a letter or digit is refused."""

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        changed = chunk.map_texts(lambda text, language: normalize(text))
        counts["normalize/changed"] += sum(map(str.__ne__, changed.texts, chunk.texts))
        empty = {row for row, text in enumerate(changed.texts) if not any(map(str.isalnum, text))}
        return changed, {row: Rejected("no letter and no digit", changed.texts[row][:40]) for row in empty}
