"""Personal data: masked in every text of every kind of record, meta and tool calls included."""

from __future__ import annotations

from collections import Counter

from pydantic import Field, field_validator

from fledge.core.errors import did_you_mean
from fledge.data.chunk import Chunk
from fledge.data.pii import KINDS, mask
from fledge.data.steps.base import Refused, Step


class PII(Step, name="pii"):
    """E-mail addresses, mainland ID cards, bank cards, IPv4 addresses and telephone numbers become [EMAIL], [ID],
    [CARD], [IP] and [PHONE]: the last step of FineWeb (Penedo et al., 2024), made to work beside Chinese characters."""

    kinds: tuple[str, ...] = Field(KINDS, description="what to mask: " + ", ".join(KINDS))

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f'"{kind}" is not one of {", ".join(KINDS)} {did_you_mean(kind, KINDS)}'.rstrip())
        return kinds

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        found: Counter[str] = Counter()
        masked = chunk.map_texts(lambda text, language: mask(text, language, found, self.kinds), everywhere=True)
        for kind, times in found.items():
            counts[f"pii/{kind}"] += times
        return masked, {}
