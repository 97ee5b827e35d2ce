"""What a step of the refinery is. Light by rule: schemas are read by `fledge --help`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fledge.core.stage import Config
from fledge.records.kinds import Record


@dataclass(frozen=True)
class Rejected:
    """Why a record is set aside: the rule that it broke and the value that broke it."""

    reason: str
    value: str = ""


class Step(Config):
    """Looks at one record at a time. A step is its own schema: its fields are its options."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "") -> None:
        cls.name = name

    def __call__(self, record: Record, counts: Counter[str]) -> Record | Rejected:
        """The record, changed or not, or why it is refused. What is worth a number goes into `counts`."""
        raise TypeError(f"{type(self).__name__} does not look at single records")


class CorpusStep(Step):
    """Looks at all records before it decides on any."""

    def decide(self, records: Iterable[Record]) -> dict[int, Rejected]:
        """The records to refuse, by their position. The set of texts kept does not depend on their order."""
        raise TypeError(f"{type(self).__name__} decides nothing")
