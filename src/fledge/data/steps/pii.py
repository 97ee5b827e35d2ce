"""Personal data and secrets: masked or replaced in every text of every kind of record, meta and tool calls included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from pydantic import Field, PrivateAttr, field_validator

from fledge.core.errors import did_you_mean
from fledge.core.reference import Source
from fledge.data.chunk import Chunk
from fledge.data.pii import KEEPABLE, KINDS, Options, mask, replace
from fledge.data.steps.base import Find, Refused, Step


class PII(Step, name="pii"):
    """E-mail and IP addresses, identity cards, bank cards, telephone numbers, passports, postal addresses, licence
    plates and secrets become [EMAIL], [IP], [ID], [CARD], [PHONE], [PASSPORT], [ADDRESS], [PLATE] and [SECRET]: the
    last step of FineWeb (Penedo et al., 2024), made to work beside Chinese characters."""

    kinds: tuple[str, ...] = Field(KINDS, description="what to find: " + ", ".join(KINDS))
    replace: Literal["mask", "consistent"] = Field(
        "mask", description="mask, or consistent: an invented value of the same form, the same for the same original"
    )
    scope: Literal["everywhere", "text"] = Field(
        "everywhere", description="text: leave meta, names, labels and tool calls as they are"
    )
    keep_ips: tuple[str, ...] = Field(("loopback",), description="IP addresses that stay: " + ", ".join(KEEPABLE))
    obfuscated: bool = Field(False, description="find name (at) host (dot) org as well")
    seed: int = Field(0, description="of the invented values")
    key: Source | None = Field(
        None, description="a file with a secret from which values are invented; without it who knows the seed can guess"
    )

    _invent: Callable[[str, str], str] | None = PrivateAttr(None)

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        return _all_in(kinds, KINDS)

    @field_validator("keep_ips")
    @classmethod
    def _keepable(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        return _all_in(keep, KEEPABLE)

    def start(self, find: Find) -> None:
        from fledge.data.pii.invent import Inventor

        if self.replace == "consistent":
            secret = b"".join(file.read_bytes() for file in find(self.key)) if self.key else b""
            self._invent = Inventor(f"{self.seed}:".encode() + secret)

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        found = Counter[str]()
        options = Options(self.obfuscated, self.keep_ips)

        def change(text: str, language: str) -> str:
            if self._invent is None:
                return mask(text, found, self.kinds, options)
            return replace(text, self._invent, found, self.kinds, options)

        changed = chunk.map_texts(change, everywhere=self.scope == "everywhere")
        for kind, times in found.items():
            counts[f"pii/{kind}"] += times
        return changed, {}


def _all_in(words: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        if word not in allowed:
            raise ValueError(f'"{word}" is not one of {", ".join(allowed)} {did_you_mean(word, allowed)}'.rstrip())
    return words
