"""Numbers as people write them: `200M` tokens, `4GiB` of memory, `100kB` of text, `90s`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_COUNT = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTES = {
    "": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_NUMBER = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def _parse(value: object, suffixes: dict[str, int], example: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in suffixes:
        raise ValueError(f"not a number with one of the units {', '.join(s for s in suffixes if s)} (as in {example})")
    return round(float(match[1].replace("_", "")) * suffixes[match[2]])


def parse_count(value: object) -> int:
    """`3M` → 3_000_000. Units k, M, B (or G), T are powers of 1,000."""
    return _parse(value, _COUNT, "3M")


def parse_bytes(value: object) -> int:
    """`100kB` → 100_000, `4GiB` → 4 · 2³⁰."""
    return _parse(value, _BYTES, "100kB")


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number that may be written `3M`."""

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
"""A number of bytes that may be written `100kB` or `4GiB`."""


def show_count(value: float) -> str:
    """3_000_000 → `3.0M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"


def show_bytes(value: float) -> str:
    """4_294_967_296 → `4.3 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def show_seconds(value: float) -> str:
    """272.4 → `4 min 32 s`."""
    if value < 10:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
