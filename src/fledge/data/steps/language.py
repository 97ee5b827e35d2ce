"""Language: names each record's language and keeps the languages asked for."""

from __future__ import annotations

from collections import Counter

from pydantic import Field

from fledge.data.chunk import Chunk
from fledge.data.language import language_of
from fledge.data.steps.base import Refused, Rejected, Step


class Language(Step, name="language"):
    """Sets `language`; a text too short to tell keeps what its source declares (Lui and Baldwin, 2012)."""

    allowed: tuple[str, ...] = Field((), description="ISO 639-1 codes to keep; empty keeps all")

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        languages = list(map(language_of, chunk.texts, chunk.languages))
        if languages != chunk.languages:
            chunk = chunk.with_column("language", languages)
        if not self.allowed:
            return chunk, {}
        wrong = {row: language for row, language in enumerate(languages) if language not in self.allowed}
        return chunk, {row: Rejected("language not asked for", language or "none") for row, language in wrong.items()}
