"""Sentences in both languages at once: the report holds English and Chinese, and the reader switches."""

from __future__ import annotations

from dataclasses import dataclass

from fledge.core.language import LANGUAGES, language, t


@dataclass(frozen=True)
class Both:
    """One text in English and in Chinese. In a page both are there, and the page shows one."""

    en: str
    zh: str

    def here(self) -> str:
        """The text in the user's language."""
        return self.zh if language() == "zh" else self.en

    def __str__(self) -> str:
        return self.here()

    def __html__(self) -> str:
        from markupsafe import escape

        if self.en == self.zh:
            return str(escape(self.en))
        return "".join(
            f'<span data-lang="{lang}" lang="{lang}">{escape(getattr(self, lang))}</span>' for lang in LANGUAGES
        )


def say(sentence: str, /, **values: object) -> Both:
    """`t(sentence, …)` in both languages; values may be bilingual themselves."""
    en, zh = (
        t(sentence, lang, **{k: getattr(v, lang) if isinstance(v, Both) else v for k, v in values.items()})
        for lang in LANGUAGES
    )
    return Both(en, zh)


def plain(text: str) -> Both:
    """A name that is the same in both languages."""
    return Both(text, text)


LANGUAGE_NAMES = {"en": Both("English", "英文"), "zh": Both("Chinese", "中文")}


def language_name(code: str) -> Both:
    """`en` → English, 英文."""
    return LANGUAGE_NAMES.get(code, plain(code))
