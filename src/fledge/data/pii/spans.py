"""What the detectors share: spans, narrow forms of characters, and the words around a find."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

Spans: TypeAlias = Iterator[tuple[int, int]]
"""(start, end) of finds, from left to right; detectors look at text whose letters and digits are narrow."""


@dataclass(frozen=True)
class Found:
    """`text[start:end]` is personal data of `kind`."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Options:
    """What detectors are told besides the text. `obfuscated`: also `name (at) host (dot) org`. `keep`: which IP
    addresses stay, of loopback, private and documentation ones."""

    obfuscated: bool = False
    keep: tuple[str, ...] = ("loopback",)


class Look:
    """A text that detectors look at. They search only near what could be a find: most of most texts is none."""

    def __init__(self, text: str, options: Options) -> None:
        self.text, self.options = text, options

    @cached_property
    def numbers(self) -> list[tuple[int, int]]:
        """Stretches of the text around every run of six digits or more, punctuation between them allowed."""
        return self._stretches(_NUMBERS, 8, 32)

    @cached_property
    def lower(self) -> str:
        """The text in lower case: where a word is sought, `in` is faster than any pattern."""
        return self.text.lower()

    def has(self, words: Iterable[str]) -> bool:
        """Whether one of the words (in lower case) stands somewhere."""
        lower = self.lower
        return any(word in lower for word in words)

    def matches(
        self, pattern: re.Pattern[str], near: re.Pattern[str], left: int, right: int
    ) -> Iterator[re.Match[str]]:
        """Matches of `pattern` that begin at most `left` characters before a match of `near` and end at most `right`
        behind it."""
        for low, high in self._stretches(near, left, right):
            yield from pattern.finditer(self.text, low, high)

    def near_numbers(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """Matches of `pattern` in `numbers`."""
        for low, high in self.numbers:
            yield from pattern.finditer(self.text, low, high)

    def _stretches(self, near: re.Pattern[str], left: int, right: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for match in near.finditer(self.text):
            if found and match.end() + right <= found[-1][1]:
                continue  # one run of letters and signs may go on to the end of the text
            end = _TO_ITS_END.match(self.text, min(len(self.text), match.end() + right))
            low, high = max(0, match.start() - left), end.end() if end else len(self.text)
            if found and low <= found[-1][1]:
                low = found.pop()[0]
            found.append((low, high))
        return found


_NUMBERS = re.compile(r"[0-9](?:[ ()（）./+-]{0,3}[0-9]){5,}")
_TO_ITS_END = re.compile(r"[0-9A-Za-z_@.:%+-]*")  # a stretch ends where a word does

# Full-width letters, digits and what stands inside numbers and addresses; punctuation of sentences stays as it is.
_NARROW = {i: i - 0xFEE0 for i in range(0xFF10, 0xFF5B) if chr(i - 0xFEE0).isalnum()}
_NARROW |= {ord(wide): ord(narrow) for wide, narrow in zip("＠．＋＿－‐‑–−＝／＃　", "@.+_-----=/# ", strict=True)}
_WIDE = re.compile(f"[{''.join(map(re.escape, map(chr, _NARROW)))}]")


def narrow(text: str) -> str:
    """The text with ordinary letters and digits for full-width ones, as long as `text`: positions stay."""
    return text if text.isascii() or not _WIDE.search(text) else text.translate(_NARROW)


def before(text: str, start: int, characters: int) -> str:
    """What stands in front of `start`, at most so many characters."""
    return text[max(0, start - characters) : start]


def after(text: str, end: int, characters: int) -> str:
    """What stands behind `end`, at most so many characters."""
    return text[end : end + characters]


def luhn(digits: str) -> bool:
    """Whether the last digit is right by ISO/IEC 7812-1, annex B."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[::-2]))) % 10 == 0
