"""The text behind token ids: where words and sentences begin, in English as in Chinese.

A tokenizer cuts text where it likes: into parts of words, into bytes of a Han character, across the words of a
Chinese sentence. Here a row is turned back into text, words and sentences are found in the text, and a token begins a
word where one begins at its first byte. Chinese words come from `jieba`, which is what whole-word masking was done
with first (Cui et al., 2021, with LTP); sentences end as in `data.chunk`.
"""

from __future__ import annotations

import json
import re
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.core.errors import need
from fledge.data.mixing.chunking import SENTENCE, border_strengths
from fledge.data.texts import HAN
from fledge.data.tokens.batches import Ids

_WORD = re.compile(rf"\s*(?:[{HAN}]+|[^\W{HAN}]+|\S)")
_HAN_RUN = re.compile(rf"[{HAN}]+")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_CUT = "\0"  # stands for a special token: no word and no sentence goes across it


class Surfaces:
    """What each token of a tokenizer (of transformers, or of `tokenizers`) looks like, as bytes."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        described = json.loads(backend.to_str())
        self.special = special_ids(tokenizer)
        self.joined = described["model"]["type"] == "WordPiece"  # spaces are between tokens, not in them
        byte_level = '"ByteLevel"' in json.dumps(described.get("pre_tokenizer"))
        size = len(self.special)
        self.bytes = [b""] * size
        self.inner = np.zeros(size, dtype=np.bool_)  # continues the token before it
        for token, number in backend.get_vocab(with_added_tokens=True).items():
            self.inner[number] = self.joined and token.startswith("##")
            self.bytes[number] = _bytes(token, byte_level, self.joined)
        for number in np.flatnonzero(self.special):
            self.bytes[number] = _CUT.encode()

    def word_begins(self, ids: Ids) -> NDArray[np.bool_]:
        """(B, T) whether a word begins with the token. A token that reaches into the next word keeps it with its own.

        Raises FledgeError where there is Chinese text and `jieba` is not installed.
        """
        return np.stack([self._row(row, self._words) for row in ids])

    def sentence_begins(self, ids: Ids) -> NDArray[np.bool_]:
        """(B, T) whether a sentence begins with the token (with the spaces before it, where a token brings them)."""
        return np.stack([self._row(row, self._sentences) for row in ids])

    def _row(self, ids: Ids, find: Any) -> NDArray[np.bool_]:
        pieces = [self.bytes[number] for number in ids]
        if self.joined:
            pieces = [self._spaced(ids, place) + piece for place, piece in enumerate(pieces)]
        text = b"".join(pieces).decode("utf-8", "surrogateescape")  # half a character stays a byte of its own
        sizes = np.fromiter((_size(character) for character in text), dtype=np.int64, count=len(text))
        places = np.concatenate([[0], np.cumsum(sizes)])  # the byte at which each character begins
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])[:-1]
        begins = np.asarray(np.isin(starts, places[find(text, places, starts)]))
        return begins | self.special[ids]

    def _spaced(self, ids: Ids, place: int) -> bytes:
        """The space before a token of WordPiece: none inside a word, at a Han character, or at the row's beginning."""
        number = ids[place]
        if not place or self.inner[number] or self.special[number] or self.special[ids[place - 1]]:
            return b""
        return b"" if self._han[number] or self._han[ids[place - 1]] else b" "

    @cached_property
    def _han(self) -> NDArray[np.bool_]:
        return np.array([bool(_HAN_RUN.search(piece.decode("utf-8", "ignore"))) for piece in self.bytes])

    def _words(self, text: str, places: Ids, starts: Ids) -> list[int]:
        """The characters with which words begin, the spaces before a word being part of it."""
        found = []
        for match in _WORD.finditer(text):
            found.append(match.start())
            run = match[0].lstrip()
            if _HAN_RUN.match(run):
                at = match.end() - len(run)
                for word in chinese_words(run)[:-1]:
                    at += len(word)
                    found.append(at)
        return found

    def _sentences(self, text: str, places: Ids, starts: Ids) -> list[int]:
        """The characters at which the first token of a sentence begins: at its first letter or at a space before it."""
        found = []
        for end in np.flatnonzero(border_strengths(text) >= SENTENCE).tolist():
            low = end
            while low and text[low - 1].isspace():
                low -= 1
            among = starts[(starts >= places[low]) & (starts <= places[end])]
            if len(among):
                found.append(int(np.searchsorted(places, among[-1])))
        return [place for place in found if place < len(text)]


def special_ids(tokenizer: Any) -> NDArray[np.bool_]:
    """(V,) which ids are special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    special = np.zeros(size, dtype=np.bool_)
    special[[number for number, token in backend.get_added_tokens_decoder().items() if token.special]] = True
    special[list(getattr(tokenizer, "all_special_ids", ()))] = True
    return special


@lru_cache(maxsize=2**14)
def chinese_words(run: str) -> tuple[str, ...]:
    """A run of Han characters cut into words."""
    return tuple(_segmenter().cut(run))


@lru_cache(maxsize=1)
def _segmenter() -> Any:
    jieba = need("jieba", "data")
    jieba.setLogLevel("WARNING")
    return jieba.Tokenizer()


def _size(character: str) -> int:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no character
        return 1
    return 1 if code < 0x80 else 2 if code < 0x800 else 3 if code < 0x10000 else 4


def _bytes(token: str, byte_level: bool, word_piece: bool) -> bytes:
    if byte_level:
        table = _byte_level()
        return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
    if word_piece:
        return token.removeprefix("##").encode()
    if found := _BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace("▁", " ").encode("utf-8", "surrogatepass")


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, int]:
    """The character that byte-level tokenizers write each byte as (Radford et al., 2019): itself, if it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(others)}
