"""Charts as inline SVG: bars and intervals in the page's own colours, the same bytes for the same data.

Names stand beside the bars as the page's text, so that they wrap, translate and stay readable on a telephone.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

_WIDTH, _HEIGHT, _FOOT, _HEAD = 360, 150, 18, 14


def bar(value: float, largest: float) -> Markup:
    """One lying bar, as long as its share of the largest."""
    width = 100 * value / largest if largest > 0 else 0
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="10"/><rect class="fill" width="{}" height="10"/></svg>'
    ).format(_number(max(width, 0.6) if value else 0))


def histogram(labels: Sequence[str], counts: Sequence[int]) -> Markup:
    """Standing bars with a label below and the count above each; bins at both ends that are empty are left out."""
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return Markup("")
    bins = range(filled[0], filled[-1] + 1)
    step = _WIDTH / len(bins)
    room, largest = _HEIGHT - _FOOT - _HEAD, max(counts)
    parts = [Markup('<svg class="histogram" viewBox="0 0 {} {}" role="img">').format(_WIDTH, _HEIGHT)]
    for place, i in enumerate(bins):
        height = room * counts[i] / largest
        left, top = place * step + 2, _HEAD + room - height
        middle = _number(place * step + step / 2)
        size = [_number(value) for value in (left, top, step - 4, height)]
        parts.append(Markup('<rect class="fill" x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(*size))
        parts.append(Markup('<text x="{}" y="{}">{}</text>').format(middle, _number(top - 3), short(counts[i])))
        parts.append(Markup('<text class="axis" x="{}" y="{}">{}</text>').format(middle, _HEIGHT - 4, labels[i]))
    return Markup("").join([*parts, Markup("</svg>")])


def interval(low: float, value: float, high: float) -> Markup:
    """A share between 0 and 1 with its interval, on a line of 0 to 100 %."""
    numbers = [_number(100 * x) for x in (low, max(high - low, 0.004), value)]
    return Markup(
        '<svg class="interval" viewBox="-1 0 102 12" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" y="5" width="100" height="2"/><rect class="range" x="{}" y="3" width="{}" height="6"/>'
        '<rect class="fill" x="{}" y="0" width="1" height="12"/></svg>'
    ).format(*numbers)


def short(count: float) -> str:
    """1,234 → 1.2k, so that numbers fit above narrow bars."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:g}"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
