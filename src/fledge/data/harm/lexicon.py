"""Words of harm and what surrounds them: who finds them, spelled as they are or disguised.

Four levels, in `words.json`: `strong` words are harmful wherever they stand; `mild` ones by their number; `topic`
words (casino, 枪支) only with a `cue` in the same sentence (for sale, 加微信); an `excuse` (police, 法院, treatment)
takes most of the weight from what stands in its sentence. `harmless` words hold a harmful one by chance (特色情况,
police escort).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from fledge.data.harm.fold import fold
from fledge.data.texts import UNSPACED

CATEGORIES = ("violence", "sexual", "hate", "self_harm", "gambling", "fraud", "drugs")
WEIGHTS = {"strong": 3.0, "mild": 1.0, "topic": 0.0, "listed": 1.0}
WITH_CUE, EXCUSED = 2.0, 0.15
_GAP = r"[\s\u200b*.\-_·|/+~•…'`^#@&=、]"  # what people put between the characters of a word, sentence ends left out
_SPELLED = re.compile(r"(?<![a-z0-9])[a-z](?:[ .\-_*·•|/\u200b]{1,2}[a-z]){2,20}(?![a-z0-9])")
_BROKEN = re.compile(r"(?<![a-z0-9])[a-z]+(?:[.\-_·•|/\u200b]{1,2}[a-z]+)+(?![a-z0-9])")
_LEET = re.compile(
    r"(?<![a-z0-9@$€])(?=[0-9@$€!+|*]{0,3}[a-z])(?=[a-z]*[0-9@$€!+|*])[a-z0-9@$€!+|*]{3,24}(?![a-z0-9@$€])"
)
_DIGITS = str.maketrans("013457@$€!+", "oieastasei" + "t")
_OTHER_DIGITS = str.maketrans("013457@$€!+", "oleastasel" + "t")
_HAN = re.compile(f"[{UNSPACED}]")
_SENTENCE = re.compile(r"[。！？!?\n；]|\.(?=\s|$)")


@dataclass(frozen=True)
class Hit:
    """`text[start:end]` is a word of `category`; `weight` is what it counts where it stands."""

    start: int
    end: int
    category: str
    weight: float
    word: str


@dataclass(frozen=True)
class _Entry:
    category: str
    level: str
    word: str


class Lexicon:
    """The words of a few languages, ready to be found. `listed` are words of the user's, of a category of their own.

    With `pinyin` Chinese words are found as they are spelled in Latin letters, too (dubo, du bo).
    """

    def __init__(self, listed: Iterable[str] = (), pinyin: bool = False) -> None:
        table = seeds()
        self.entries: dict[str, _Entry] = {}
        for word in listed:
            self._add(word, "listed", "listed")
        for level in ("topic", "mild", "strong"):  # the strongest sense of a word stays
            for category, languages in table[level].items():
                for words in languages.values():
                    for word in words:
                        self._add(word, category, level)
        if pinyin:
            self._add_pinyin()
        harmless = {_key(fold(word)) for words in table["harmless"].values() for word in words}
        self.harmless = harmless - set(self.entries)
        self._han = _han_pattern({word for word in {*self.entries, *self.harmless} if _HAN.search(word)})
        self._latin = _latin_pattern({word for word in {*self.entries, *self.harmless} if not _HAN.search(word)})
        self._masked = _by_length(word for word in self.entries if word.isascii() and word.isalpha())
        cues = table["cues"]
        self._cues = {category: _any_of(_merged(cues["any"], cues[category])) for category in CATEGORIES}
        self._excuses = _any_of(table["excuses"])

    def _add(self, word: str, category: str, level: str) -> None:
        word = _key(fold(word))
        if len(word) > 1 and (_HAN.search(word) or sum(map(str.isalnum, word)) > 2):
            self.entries[word] = _Entry(category, level, word)

    def _add_pinyin(self) -> None:
        from fledge.core.errors import missing_extra

        try:
            from pypinyin import lazy_pinyin
        except ImportError:
            raise missing_extra("pypinyin", "data") from None
        for word, entry in list(self.entries.items()):
            syllables = lazy_pinyin(word) if _HAN.search(word) and entry.level != "topic" else []
            for spelled in ("".join(syllables), " ".join(syllables)):
                if len(syllables) > 1 and len(spelled) >= 5 and spelled.isascii():
                    self.entries.setdefault(spelled, _Entry(entry.category, entry.level, entry.word))

    def hits(self, text: str) -> list[Hit]:
        """Words of harm from left to right, without overlap; those that count nothing where they stand left out."""
        folded = fold(text)
        places = dict(self._plain(folded))
        if not _is_prose(folded):
            for span, entry in self._disguised(folded):
                if not any(a < span[1] and span[0] < b for a, b in places):
                    places[span] = entry
        if not places:
            return []
        found = []
        for (start, end), entry in sorted(places.items()):
            low, high = _sentence(folded, start, end)
            weight = self._weight(entry, folded[low:start] + " " + folded[end:high])
            if weight > 0:
                found.append(Hit(start, end, entry.category, weight, entry.word))
        return found

    def _weight(self, entry: _Entry, around: str) -> float:
        weight = WEIGHTS[entry.level]
        if entry.level == "topic" and self._cues[entry.category].search(around):
            weight = WITH_CUE
        return weight * (EXCUSED if weight and self._excuses.search(around) else 1.0)

    def _plain(self, folded: str) -> Iterator[tuple[tuple[int, int], _Entry]]:
        """Words as they are; between Han characters one or two signs or spaces are passed over."""
        for pattern in (self._latin,) if folded.isascii() else (self._han, self._latin):
            for match in pattern.finditer(folded):
                word = _key(match[0])
                if (entry := self._entry(word)) is not None:
                    yield match.span(), entry

    def _entry(self, word: str) -> _Entry | None:
        """The entry of a word, of its singular, or of it with letters less drawn out; None for harmless ones."""
        for form in (word, word.removesuffix("s"), word.removesuffix("es")):
            for short in (form, re.sub(r"(.)\1+", r"\1\1", form), re.sub(r"(.)\1+", r"\1", form)):
                if short in self.harmless:
                    return None
                if short in self.entries:
                    return self.entries[short]
        return None

    def _disguised(self, folded: str) -> Iterator[tuple[tuple[int, int], _Entry]]:
        """f u c k, f.u.c.k, fu-ck, sh1t, a$$hole, f*ck: the whole run of letters and signs is one word."""
        for match in (*_SPELLED.finditer(folded), *_BROKEN.finditer(folded)):
            if entry := self.entries.get(re.sub("[^a-z]", "", match[0])):
                yield match.span(), entry
        for match in _LEET.finditer(folded):
            token = match[0].rstrip("!+|") if match[0][-1] in "!+|" else match[0]
            for word in {token.translate(_DIGITS), token.translate(_OTHER_DIGITS)}:
                if entry := self.entries.get(word):
                    yield (match.start(), match.start() + len(token)), entry
                    break
            else:
                if "*" in token and (entry := self._starred(token)):
                    yield (match.start(), match.start() + len(token)), entry

    def _starred(self, token: str) -> _Entry | None:
        stars = token.count("*")
        if not len(token) >= 4 or stars > len(token) // 2 or not re.fullmatch("[a-z*]+", token):
            return None
        pattern = re.compile(token.replace("*", "[a-z]"))
        return next((self.entries[word] for word in self._masked.get(len(token), ()) if pattern.fullmatch(word)), None)


@cache
def seeds() -> dict[str, Any]:
    """The words that come with fledge: `words.json`."""
    return json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _key(folded: str) -> str:
    """A folded word as it is looked up: no signs between its Han characters, one space between its words."""
    if _HAN.search(folded):
        return re.sub(_GAP, "", folded)
    return " ".join(folded.replace("’", "'").split())


def _is_prose(folded: str) -> bool:
    """Whether no disguise can be in the text: cheap, and true of most texts."""
    return not _SIGNS.search(folded)


_SIGNS = re.compile(
    r"[a-z0-9@$][.\-_*·•|/\u200b@$€!+0-9]{1,2}[a-z*]|(?<![a-z])[a-z] [a-z] [a-z](?![a-z])|[0-9@$€][a-z]|[a-z][0-9@$*€]"
)


def _sentence(text: str, start: int, end: int) -> tuple[int, int]:
    """The sentence around a word, at most 120 characters to either side."""
    low = max(0, start - 120)
    borders = [match.end() for match in _SENTENCE.finditer(text, low, start)]
    after = _SENTENCE.search(text, end, min(len(text), end + 120))
    return (borders[-1] if borders else low), (after.start() if after else min(len(text), end + 120))


def _any_of(languages: dict[str, list[str]]) -> re.Pattern[str]:
    words = [fold(word) for some in languages.values() for word in some]
    latin = "|".join(re.escape(word) for word in words if not _HAN.search(word))
    han = "|".join(re.escape(word) for word in words if _HAN.search(word))
    return re.compile(rf"{han}|(?<![a-z])(?:{latin})(?![a-z])")


def _merged(one: dict[str, list[str]], other: dict[str, list[str]]) -> dict[str, list[str]]:
    return {language: [*one.get(language, ()), *other.get(language, ())] for language in {**one, **other}}


def _by_length(words: Iterable[str]) -> dict[int, list[str]]:
    return {length: list(some) for length, some in groupby(sorted(words, key=lambda w: (len(w), w)), key=len)}


def _han_pattern(words: set[str]) -> re.Pattern[str]:
    return re.compile(_trie(words, f"{_GAP}{{0,2}}") or r"(?!)")


def _latin_pattern(words: set[str]) -> re.Pattern[str]:
    """Each letter may be drawn out (fuuuck); a plural is the word."""
    body = _trie(words, "", repeat=True)
    return re.compile(rf"(?:{body})(?:e?s)?(?![a-z0-9])" if body else r"(?!)")


def _trie(words: Iterable[str], between: str, repeat: bool = False) -> str:
    """A pattern of all words that shares their beginnings and takes the longest: fast in `re` for thousands."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return _pattern(root, between, repeat, first=True)


def _pattern(node: dict[str, Any], between: str, repeat: bool, first: bool = False) -> str:
    branches = []
    for character, below in sorted(node.items()):
        if character:
            one = r"\s+" if character == " " else re.escape(character) + ("+" if repeat and character.isalpha() else "")
            if (
                first and repeat
            ):  # a word begins here: said behind its first letter, so that `re` can leap to that letter
                letter = re.escape(character)
                one = rf"{letter}(?<![a-z0-9]{letter}){letter}*"
            branches.append(("" if first else between) + one + _pattern(below, between, repeat))
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{joined})?" if "" in node else joined
