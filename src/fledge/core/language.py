"""The user's language. `t("Wrote {path}", path=p)` gives the message in English or 简体中文.

The English sentence is its own key. Translations stand in `core/locale/zh/<floor>.json`, one file a floor;
a test fails when a sentence has none. `FLEDGE_LANG` (en, zh) decides, then the system's locale.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

LANGUAGES = ("en", "zh")


def language() -> str:
    """The interface language in force: "en" or "zh"."""
    for variable in ("FLEDGE_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(variable, "")
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


@cache
def catalogue(lang: str) -> dict[str, str]:
    """All translations into `lang`, from every floor's file."""
    sentences: dict[str, str] = {}
    for file in sorted((Path(__file__).parent / "locale" / lang).glob("*.json")):
        sentences.update(json.loads(file.read_text(encoding="utf-8")))
    return sentences


def t(sentence: str, /, lang: str | None = None, **values: object) -> str:
    """`sentence` in the user's language (or `lang`), with its values filled in."""
    lang = lang or language()
    template = sentence if lang == "en" else catalogue(lang).get(sentence, sentence)
    return template.format(**values) if values else template
