"""How much a text says for its length: how far it can be compressed, and how many of its units are different.

Both are measured so that length does not matter. zlib squeezes a long text further than a short one, so it is given
windows of at most 2 kB, and the share of bytes left is divided by what prose of the language and of that length
leaves: 1 is prose, 0.5 says the same again and again, 1.5 is noise. Of the units, windows of 100 are looked at: the
moving-average type-token ratio (Covington and McFall, 2010).
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence

WINDOW = 2048
"""Bytes."""
_LOOKED_AT = 16
"""Windows at most, evenly spread."""
# Share of bytes that zlib (level 6) leaves of prose, by length: medians, found by benchmarks/chinese_thresholds.py.
_SIZES = (64, 128, 256, 512, 1024, 2048)
_LEFT = {
    "zh": (1.172, 0.977, 0.773, 0.627, 0.520, 0.440),
    "en": (1.031, 0.828, 0.695, 0.604, 0.537, 0.491),
}


def compressed(text: str, language: str = "") -> float:
    """Share of bytes that zlib leaves of the text, over what it leaves of prose; 1 for an empty text."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) < 16:
        return 1.0
    starts = range(0, max(1, len(raw) - WINDOW // 2), WINDOW)
    windows = [raw[at : at + WINDOW] for at in list(starts)[:: 1 + (len(starts) - 1) // _LOOKED_AT]]
    left = sum(len(zlib.compress(window, 6)) for window in windows)
    usual = sum(len(window) * _usual(len(window), language) for window in windows)
    return left / usual


def _usual(size: int, language: str) -> float:
    """What zlib leaves of a byte of prose, by linear interpolation between the sizes that were measured."""
    left = _LEFT["zh" if language in ("zh", "ja") else "en"]
    at = bisect_right(_SIZES, size)
    if at in (0, len(_SIZES)):
        return left[max(0, at - 1)]
    low, high = _SIZES[at - 1], _SIZES[at]
    return left[at - 1] + (left[at] - left[at - 1]) * (size - low) / (high - low)


def distinct(units: Sequence[str], window: int = 100) -> float:
    """Mean share of different units in windows of `window`, half overlapping; 1 for no units."""
    if not units:
        return 1.0
    step = max(1, window // 2)
    starts = range(0, max(1, len(units) - window + 1), step)
    shares = [len(set(units[at : at + window])) / len(units[at : at + window]) for at in starts]
    return sum(shares) / len(shares)
