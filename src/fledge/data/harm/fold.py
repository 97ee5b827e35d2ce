"""One form for all spellings of a word: for looking words up, never for keeping.

Folding gives one character for each, so that a position in the folded text is the same position in the original.
Letters lose case, width and accents; Cyrillic and Greek letters become the Latin ones they look like; radicals
(⼝, ⺝) the characters they are of; traditional characters simplified ones; and a small table of characters that stand
for others of the same shape or sound (涩情, 睹博) is undone. Invisible characters become U+200B.
"""

from __future__ import annotations

import unicodedata
from functools import cache

_LETTERS = dict(
    zip(
        "аеорсухіјѕԁԛкмнтвгпьɡаɑαβεικνορτυχηωμγћցոսքհ",
        "aeopcyxijsdqkmhtbrnbgaaabeiknoptuxnwuyhgnuph",
        strict=True,
    )
)
_INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064"
    "\ufe0e\ufe0f\ufeff"
)
_RADICALS = dict(zip("⺝⺼⺮⻊⻋⻓⻔⻢⻦⻥⻰", "月肉竹足车长门马鸟鱼龙", strict=True))  # NFKC knows the Kangxi ones


class _Folds(dict[int, str]):
    """Code point → folded character, worked out when a character is first met."""

    def __init__(self, han: dict[str, str]) -> None:
        super().__init__((ord(character), "\u200b") for character in _INVISIBLE)
        self.han = han

    def __missing__(self, code: int) -> str:
        character = chr(code)
        folded = unicodedata.normalize("NFKC", character)
        if len(folded) != 1:
            folded = character
        folded = _RADICALS.get(folded, folded)
        base = (
            unicodedata.normalize("NFD", folded)[0]
            if folded.isalpha() and not "\uac00" <= folded <= "\ud7a3"
            else folded
        )
        lower = base.lower()
        folded = lower if len(lower) == 1 else base
        self[code] = self.han.get(folded, _LETTERS.get(folded, folded))
        return self[code]


@cache
def _folds() -> _Folds:
    from fledge.data.harm.lexicon import seeds

    table = seeds()
    han = {pair[0]: pair[1] for pair in table["traditional"].split()}
    return _Folds(han | {a: b.lower() for a, b in table["lookalikes"].items()})


def fold(text: str) -> str:
    """The text as it is looked up, as long as `text`."""
    return text.lower() if text.isascii() else text.translate(_folds())
