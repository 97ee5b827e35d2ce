"""The words of a text for lexical search, in Chinese as in English.

English words are folded (NFKC, case) and lose the plural's s (Harman's S stemmer, 1991). Chinese has no spaces: it is
cut into overlapping pairs of characters, which find as much as a segmenter's words (Nie et al., 1999; measured on
articles of Chinese law: recall@10 of 52% and 51%) and need nothing installed, or by `jieba`'s search mode. An index
notes how it was cut, and is asked in the same way.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from functools import cache, lru_cache
from typing import Any, Literal

from fledge.core.errors import need
from fledge.data.texts import HAN, UNSPACED

Segmenter = Literal["auto", "jieba", "bigrams"]
LONE = re.compile(rf"[{UNSPACED}]")
"""a character of a script without spaces"""
_RUN = re.compile(rf"([{UNSPACED}]+)|[^\W_{UNSPACED}]+")
_WRAPPED = re.compile(rf"(?<=[{HAN}])[ \t]*\n[ \t]*(?=[{HAN}])")  # a line of Chinese ends anywhere, within words, too
_HAN = re.compile(rf"[{HAN}]+")


@cache
def resolve(segmenter: Segmenter) -> Literal["jieba", "bigrams"]:
    """What "auto" means here: `jieba` where it is installed."""
    if segmenter == "auto":
        return "jieba" if importlib.util.find_spec("jieba") else "bigrams"
    return segmenter


def words(text: str, segmenter: Segmenter = "bigrams") -> list[str]:
    """The words of a text in order, with repetition. Raises FledgeError where `jieba` is asked for and missing."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = _WRAPPED.sub("", text)
    segmenter = resolve(segmenter)
    found: list[str] = []
    for match in _RUN.finditer(text.casefold()):
        run = match[1]
        if run is None:
            found.append(singular(match[0]))
        elif segmenter == "jieba" and _HAN.fullmatch(run):
            found += _segmented(run)
        else:
            found += pairs(run)
    return found


def pairs(run: str) -> list[str]:
    """检索者 → 检索, 索者; a character that stands alone is a word."""
    return [run[i : i + 2] for i in range(len(run) - 1)] or [run]


def singular(word: str) -> str:
    """The S stemmer: -ies → -y, -es → -e, -s → nothing, each with its exceptions; the first rule that ends fits."""
    if len(word) < 4 or not word.endswith("s") or not word.isascii():
        return word
    if word.endswith("ies"):
        return word if word.endswith(("eies", "aies")) else word[:-3] + "y"
    if word.endswith("es"):
        return word if word.endswith(("aes", "ees", "oes")) else word[:-1]
    return word if word.endswith(("us", "ss")) else word[:-1]


@lru_cache(maxsize=2**14)
def _segmented(run: str) -> tuple[str, ...]:
    return tuple(_jieba().cut_for_search(run))


@cache
def _jieba() -> Any:
    jieba = need("jieba", "data")
    jieba.setLogLevel("WARNING")
    return jieba.Tokenizer()
