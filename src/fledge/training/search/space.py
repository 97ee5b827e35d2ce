"""What a sweep varies: `base.train.lr=1e-4..1e-2:log`, `base.train.batch_size=8,16,32`, `chat.lora.rank=4..64:log`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.units import parse_count

Value: TypeAlias = float | int | str
Values: TypeAlias = dict[str, Value]
"""A value for every key that is varied."""

_RANGE = re.compile(r"(?P<low>[^:,\s]+?)\.\.(?P<high>[^:,\s]+)(?P<log>:log)?(?::(?P<points>\d+))?")
_WHOLE = re.compile(r"[+-]?\d+|\d+(?:\.\d+)?[kKMBGT]")
EXAMPLE = "base.train.lr=1e-4..1e-2:log, base.train.batch_size=8,16,32, chat.train.epochs=1..4"


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    key: str
    values: tuple[str, ...]

    def at(self, share: float) -> Value:
        """The value at a share of the way, 0 ≤ share < 1."""
        return self.values[int(share * len(self.values))]

    def grid(self) -> list[Value]:
        return list(self.values)

    @property
    def ends(self) -> tuple[Value, Value]:
        return self.values[0], self.values[-1]


@dataclass(frozen=True)
class Range:
    """A number between two others, both included; evenly in its logarithm with `log`."""

    key: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    points: int = 0

    def at(self, share: float) -> Value:
        """The value at a share of the way, 0 ≤ share ≤ 1, to four digits."""
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole and not self.log else (self.low, self.high)
        value = low * (high / low) ** share if self.log else low + (high - low) * share
        return self.rounded(value)

    def rounded(self, value: float) -> Value:
        """The value as a recipe would write it."""
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.whole else min(max(float(f"{inside:.4g}"), self.low), self.high)

    def grid(self) -> list[Value]:
        """`points` values from end to end; all of a small range of whole numbers. Raises FledgeError without them."""
        if self.whole and not self.points and not self.log:
            return list(range(int(self.low), int(self.high) + 1))
        if self.points < 2:
            raise FledgeError(
                Problem(
                    t("a grid needs to know how many points a range has"),
                    where=f"--vary {self.key}",
                    fix=f"{self.key}={self.low:g}..{self.high:g}{':log' if self.log else ''}:5",
                )
            )
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        places = [low + (high - low) * i / (self.points - 1) for i in range(self.points)]
        return list(dict.fromkeys(self.rounded(math.exp(x) if self.log else x) for x in places))

    @property
    def ends(self) -> tuple[Value, Value]:
        return self.rounded(self.low), self.rounded(self.high)


Dimension: TypeAlias = Choice | Range


def parse(text: str) -> Dimension:
    """What a `--vary` says. Raises FledgeError."""
    key, equals, spec = (part.strip() for part in text.partition("="))
    if not equals or "." not in key or not spec:
        raise FledgeError(Problem(t("--vary takes stage.key=values"), found=text, allowed=EXAMPLE))
    match = _RANGE.fullmatch(spec)
    if match is None:
        values = tuple(dict.fromkeys(value.strip() for value in spec.split(",") if value.strip()))
        if len(values) < 2:
            raise FledgeError(Problem(t("there is nothing to choose from"), f"--vary {key}", spec, EXAMPLE))
        return Choice(key, values)
    whole = all(_WHOLE.fullmatch(match[end]) for end in ("low", "high"))
    try:
        low, high = (
            float(parse_count(match[e]) if whole and match[e][0] != "-" else match[e]) for e in ("low", "high")
        )
    except ValueError:
        raise FledgeError(Problem(t("is not a range of numbers"), f"--vary {key}", spec, EXAMPLE)) from None
    if not low < high or (match["log"] and low <= 0) or not math.isfinite(high):
        raise FledgeError(
            Problem(t("a range goes from a lower number to a higher one (above 0 with log)"), f"--vary {key}", spec)
        )
    return Range(key, low, high, bool(match["log"]), whole, int(match["points"] or 0))


def grid(space: list[Dimension]) -> list[Values]:
    """Every combination, the last key changing fastest."""
    keys = [dimension.key for dimension in space]
    return [dict(zip(keys, values, strict=True)) for values in product(*(dimension.grid() for dimension in space))]
