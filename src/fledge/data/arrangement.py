"""How records are divided: what stays together, what every part must hold, and in which order records are held out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.data.language import language_of
from fledge.data.texts import text_of
from fledge.records.kinds import Labelled, Record

_DATE = re.compile(r"(\d{4})(?:[-/.年]?(\d{1,2}))?(?:[-/.月]?(\d{1,2}))?[日号月年]?(?:T|\s+)?(\d{2}:\d{2}.*)?$")


@dataclass(frozen=True)
class Arrangement:
    """What stays together, what is represented in every part, and in which order records are held out."""

    by: str = "id"
    """"id", or a key of meta: records that share it stay together"""
    stratify: str = ""
    """"label", or a key of meta: each of its values gives its share to every part"""
    time: str = ""
    """a key of meta that holds a date: what is later is held out, what has none is trained on"""

    def group(self, record: Record) -> str:
        """Records of one group are in one part."""
        return record.id if self.by == "id" else record.meta.get(self.by, record.id)

    def stratum(self, record: Record) -> str:
        """The record's language, and where that is asked for what it is stratified by."""
        return f"{language_in(record)}/{self._value(record)}" if self.stratify else language_in(record)

    def date(self, record: Record) -> str:
        """The record's date as text that sorts, "" where it has none."""
        return date_of(record.meta.get(self.time, "")) if self.time else ""

    def _value(self, record: Record) -> str:
        if self.stratify == "label" and isinstance(record, Labelled):
            return record.label
        return record.meta.get(self.stratify, "")

    def missing_from(self, record: Record) -> set[str]:
        """Which of the keys asked for the record has not."""
        asked = {self.by} - {"id"} | {self.stratify, self.time} - {""}
        return {
            key for key in asked
            if key not in record.meta and not (key == self.stratify == "label" and isinstance(record, Labelled))
        }  # fmt: skip


def date_of(text: str) -> str:
    """A date as text that sorts as dates do: ISO 8601, `20210305`, `2021/3/5`, `2021年3月5日`, `2021`; else ""."""
    match = _DATE.match(text.strip())
    if not match:
        return ""
    year, month, day = (int(part or 1) for part in match.groups()[:3])
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return ""
    return f"{year:04}-{month:02}-{day:02}" + (f"T{match[4].strip()}" if match[4] else "")


def language_in(record: Record) -> str:
    """The record's language, told from its text where it does not say."""
    return record.language or language_of(text_of(record)) or "und"


def no_such_key(arrangement: Arrangement, missing: set[str], keys: set[str]) -> FledgeError:
    """That no record has what `arrangement` asks for; `keys` are some that there are. Nothing missing: no date."""
    if not missing:
        return FledgeError(
            Problem(t("no record has a date there"), where="time", found=arrangement.time,
                    allowed="2021-03-05, 2021/3/5, 2021年3月5日, 2021")
        )  # fmt: skip
    return FledgeError(
        *(
            Problem(
                t("no record has such a key"),
                where=next(name for name in ("by", "stratify", "time") if getattr(arrangement, name) == key),
                found=key,
                allowed=listing(["id", *sorted(keys)], 12),
            )
            for key in sorted(missing)
        )
    )
