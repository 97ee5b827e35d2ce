"""Harm in text: hate, violence, sexual content, self-harm, gambling, fraud and drugs, in English and Chinese.

    judge = Judge()
    verdict = judge("加微信，出售冰毒，货到付款", units=13)       # score 150.0, {"drugs": 6.0}

The score is the weight of the words found (`harm.lexicon`) per 1,000 units, a text of fewer than 40 units counted as
40: one strong word makes a short text harmful and hardly touches a long one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.harm.lexicon import CATEGORIES, Hit, Lexicon

_LANGUAGE = re.compile(r"([a-z]{2,3})(?:[-_].*)?$")
_NOT_A_LIST = re.compile("package|bower|index|readme|license", re.IGNORECASE)

__all__ = ["CATEGORIES", "SHORTEST", "Hit", "Judge", "Lexicon", "Verdict", "blot", "read_words"]

SHORTEST = 40
"""Units that the shortest text counts for."""


@dataclass(frozen=True)
class Verdict:
    """What was found in a text: weight per 1,000 units, and weight by category, the heaviest first."""

    score: float
    categories: dict[str, float]
    words: tuple[str, ...]


class Judge:
    """Scores texts with one lexicon."""

    def __init__(self, lexicon: Lexicon | None = None) -> None:
        self.lexicon = lexicon or Lexicon()

    def __call__(self, text: str, units: int) -> Verdict:
        """The verdict on a text of so many units."""
        hits = self.lexicon.hits(text)
        weights = Counter[str]()
        for hit in hits:
            weights[hit.category] += hit.weight  # type: ignore[assignment]
        score = 1000 * sum(weights.values()) / max(units, SHORTEST)
        heaviest = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
        return Verdict(round(score, 1), dict(heaviest), tuple(dict.fromkeys(hit.word for hit in hits)))


def blot(text: str, hits: Iterable[Hit]) -> str:
    """The text with an asterisk for every character of the hits."""
    for hit in hits:
        text = text[: hit.start] + "*" * (hit.end - hit.start) + text[hit.end :]
    return text


def read_words(files: Iterable[Path], languages: Sequence[str]) -> list[str]:
    """Words from lists: `.json` (an array) and `.txt` (a line each, # for comments), files or folders of them.

    Of files that are named by a language (en.json, zh.txt) only those of `languages` are read. Raises FledgeError where
    nothing can be read.
    """
    files, words = list(files), list[str]()
    for file in (file for place in files for file in (sorted(place.rglob("*")) if place.is_dir() else [place])):
        language = _LANGUAGE.match(file.stem)
        if file.suffix not in (".json", ".txt") or _NOT_A_LIST.match(file.stem):
            continue
        if language is None or language[1] in languages:
            words += _words_of(file)
    if not words:
        places = ", ".join(map(str, files))
        raise FledgeError(Problem(t("no words in {places}", places=places), allowed=".json, .txt"))
    return words


def _words_of(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise FledgeError(Problem(t("{file} is not JSON", file=file), found=str(error))) from None
    return [word.strip() for word in found if isinstance(word, str) and word.strip()] if isinstance(found, list) else []
