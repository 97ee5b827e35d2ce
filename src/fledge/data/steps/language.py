"""Language: names each record's language and keeps the languages asked for."""

from __future__ import annotations

from collections import Counter

from pydantic import Field

from fledge.data.chunk import Chunk
from fledge.data.language import SHORT, Model, identify, language_of
from fledge.data.steps.base import Find, Refused, Rejected, Step


class Language(Step, name="language"):
    """Sets `language`; a text too short to tell keeps what its source declares (Lui and Baldwin, 2012; with
    `model: fasttext` Joulin et al., 2016)."""

    allowed: tuple[str, ...] = Field((), description="ISO 639-1 codes to keep; empty keeps all")
    model: Model = Field("py3langid", description="what decides where the script does not")
    min_confidence: float = Field(0.0, ge=0, le=1, description="least probability of the language (FineWeb: 0.65)")
    mixed: bool = Field(False, description="count the paragraphs that are in another language than their text")

    def start(self, find: Find) -> None:
        language_of("The model is loaded before the first chunk, or is missing now.", "", self.model)

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        found = [identify(*row, self.model) for row in zip(chunk.texts, chunk.languages, strict=True)]
        languages = [language for language, _ in found]
        if languages != chunk.languages:
            chunk = chunk.with_column("language", languages)
        if self.mixed:
            for text, language in zip(chunk.texts, languages, strict=True):
                self._count(text, language, counts)
        refused: Refused = {}
        for row, (language, probability) in enumerate(found):
            if self.allowed and language not in self.allowed:
                refused[row] = Rejected("language not asked for", language or "none")
            elif probability < self.min_confidence:
                refused[row] = Rejected("language not certain", f"{language} {probability:.2f}")
        return chunk, refused

    def _count(self, text: str, language: str, counts: Counter[str]) -> None:
        """Characters of paragraphs, and of those long enough to tell that are in another language."""
        for paragraph in filter(None, map(str.strip, text.split("\n"))):
            counts["language/characters"] += len(paragraph)
            if len(paragraph) > SHORT and language_of(paragraph, language, self.model) != language:
                counts["language/characters in another language"] += len(paragraph)
