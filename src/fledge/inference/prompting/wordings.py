"""What the techniques say to a model: the same sentences in English and Chinese, one page a language.

The language is the question's, not the user interface's: a Chinese question is put in Chinese.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

Language = Literal["en", "zh"]


def say(language: Language, page: str, key: str, /, **values: object) -> str:
    """The sentence `key` of a technique's page, with its values filled in (texts with braces stay as they are)."""
    text: Any = _page(language)[page]
    for part in key.split("."):
        text = text[part]
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), str(text))


@cache
def _page(language: Language) -> dict[str, Any]:
    file = Path(__file__).parent / "wordings" / f"{language}.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
