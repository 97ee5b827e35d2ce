"""Language: names each record's language and keeps the languages asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from pydantic import Field

from fledge.data.language import language_of
from fledge.data.steps.base import Rejected, Step
from fledge.data.texts import text_of
from fledge.records.kinds import Record


class Language(Step, name="language"):
    """Sets `language`; a text too short to tell keeps what its source declares (Lui and Baldwin, 2012)."""

    allowed: tuple[str, ...] = Field((), description="ISO 639-1 codes to keep; empty keeps all")

    def __call__(self, record: Record, counts: Counter[str]) -> Record | Rejected:
        language = language_of(text_of(record), record.language)
        if self.allowed and language not in self.allowed:
            return Rejected("language not asked for", language or "none")
        return record if language == record.language else replace(record, language=language)
