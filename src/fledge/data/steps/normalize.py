"""Normalisation: mojibake put right, one Unicode form, one kind of line end, no invisible characters."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from typing import Any, Literal

from pydantic import Field

from fledge.core.errors import need
from fledge.data.chunk import Chunk
from fledge.data.language import is_chinese
from fledge.data.steps.base import Find, Refused, Rejected, Step

_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u200b\u2060\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
_TRAILING = re.compile(r"[ \t]+(?=\n|$)")
_MANY_LINES = re.compile(r"\n{4,}")
_HIGH_RUN = re.compile("[\x80-\xffŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™]{6,}")  # what a byte over 127 is in Latin-1 or cp1252
_HAN = re.compile("[㐀-鿿]")
_COMMON = frozenset(
    "的一是不了在有人我他这這个個们們中来來上大为為和国國地到以说說时時要就出会會可也你对對生能而子那得于於着下自之年"
)
"""Characters without which hardly a Chinese sentence is written; a quarter of a text, in either script."""


def normalize(text: str, form: Literal["nfc", "nfkc"] = "nfc") -> str:
    """The text as it was meant. “”, full-width punctuation and emoji (with their joiners) stay as they are, unless
    the form is NFKC."""
    if text.isascii():
        if text.isprintable():  # one line of plain ASCII, as most turns of a chat are
            return text.strip()
    else:
        import ftfy
        from ftfy.badness import is_bad

        if _HIGH_RUN.search(text):
            text = chinese_bytes(text)
        text = _line_ends(text)
        if is_bad(text):  # UTF-8 read as Latin-1 and the like (Speer, 2019)
            text = ftfy.fix_encoding(text)
        if not unicodedata.is_normalized(form.upper(), text):  # type: ignore[arg-type]
            text = unicodedata.normalize(form.upper(), text)  # type: ignore[arg-type]
    text = _INVISIBLE.sub("", _line_ends(text))
    return _MANY_LINES.sub("\n\n\n", _TRAILING.sub("", text)).strip()


def chinese_bytes(text: str) -> str:
    """GBK or Big5 that was read as Latin-1 or Windows-1252, read again; the same text where that is not certain.

    Certain is: every byte is valid in that encoding, at least six Han characters come out, and at least one in eight
    of them is among the commonest, as in Chinese sentences and hardly ever in chance characters.
    """
    import ftfy.bad_codecs.sloppy  # noqa: F401  (makes sloppy-windows-1252 known to str.encode)

    if _HAN.search(text):
        return text
    raw = b""
    for encoding in ("latin-1", "sloppy-windows-1252"):
        try:
            raw = text.encode(encoding)
            break
        except UnicodeEncodeError:
            continue
    if not raw or _decoded(raw, "utf-8"):
        return text
    best, best_share = text, 1 / 8
    for encoding in ("gb18030", "big5"):
        again = _decoded(raw, encoding)
        han = _HAN.findall(again)
        share = sum(character in _COMMON for character in han) / max(1, len(han))
        if len(han) >= 6 and share > best_share:
            best, best_share = again, share
    return best


def _decoded(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return ""


def _line_ends(text: str) -> str:
    return (
        text.replace("\r\n", "\n")
        .replace("\r", "\n")
        .replace("\u2028", "\n")
        .replace("\u2029", "\n\n")
        .replace("\x85", "\n")
    )


@cache
def _converter(script: str) -> Any:
    return need("opencc", "data", "OpenCC").OpenCC("t2s" if script == "simplified" else "s2t")


class Normalize(Step, name="normalize"):
    """Repairs encoding and white space of every text; a record left without a letter or digit is refused."""

    form: Literal["nfc", "nfkc"] = Field("nfc", description="nfkc also makes full-width forms and ligatures plain")
    script: Literal["keep", "simplified", "traditional"] = Field("keep", description="of Chinese texts (OpenCC)")

    def start(self, find: Find) -> None:
        if self.script != "keep":
            _converter(self.script)

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        changed = chunk.map_texts(self._normal)
        counts["normalize/changed"] += sum(map(str.__ne__, changed.texts, chunk.texts))
        empty = {row for row, text in enumerate(changed.texts) if not any(map(str.isalnum, text))}
        return changed, {row: Rejected("no letter and no digit", changed.texts[row][:40]) for row in empty}

    def _normal(self, text: str, language: str) -> str:
        text = normalize(text, self.form)
        if self.script != "keep" and is_chinese(text, language):
            text = _converter(self.script).convert(text)
        return text
