"""Which language a text is in.

The script decides what it can: kana make Japanese, Hangul Korean, Han alone Chinese; a Chinese text with
English words in it is Chinese. For other scripts py3langid decides (Lui and Baldwin, 2012: naive Bayes over byte
n-grams) among the languages below: left free it takes "hi / hello?" for Breton.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from fledge.data.texts import HAN, KANA, letters

CANDIDATES = (
    "ar", "bg", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl",
    "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh",
)  # fmt: skip
SHORT = 40
"""Below so many letters a text says too little: what its source declares then stands."""
_LOOKED_AT = 600  # characters: enough to tell
_HAN, _KANA, _HANGUL = re.compile(f"[{HAN}]+"), re.compile(f"[{KANA}]+"), re.compile("[가-힣ᄀ-ᇿ]+")


def language_of(text: str, declared: str = "") -> str:
    """ISO 639-1 code of the text's language; `declared` where the text has no letter, or too few to tell."""
    text = text[:_LOOKED_AT]
    total = letters(text)
    if not total or (total < SHORT and declared):
        return declared
    if not text.isascii():
        han, kana, hangul = (sum(map(len, script.findall(text))) for script in (_HAN, _KANA, _HANGUL))
        if kana > 0.1 * (han + kana):
            return "ja"
        if hangul > 0.3 * total:
            return "ko"
        if han > 0.2 * total:  # one Han character says about as much as four Latin letters
            return "zh"
    return str(_identifier().classify(text)[0])


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages([code for code in CANDIDATES if code in identifier.labels])
    return identifier
