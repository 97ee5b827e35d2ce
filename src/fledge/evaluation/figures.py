"""Plots as inline SVG: text stays text, colours are the page's (light and dark), the same data gives the same bytes.

No words stand in a figure, only numbers and the names of models and languages: titles, axes and legends are set in
the page, in both languages. Figures are narrow, so that a telephone shows them at their own size.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

SIZE = (4.6, 2.7)  # inches at 100 dots: 460 × 270
COLOURS = 6
BASELINES = 3
_INK, _GRID = "#010101", "#020202"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fledge",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _GRID),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size", "ytick.minor.size"), 0),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}


def series_colour(index: int, baseline: bool = False) -> str:
    """The CSS colour of a series; the page defines six, and three greys for baselines."""
    return f"var(--b{index % BASELINES + 1})" if baseline else f"var(--s{index % COLOURS + 1})"


def _mark(colour: str) -> str:
    """A stand-in for `var(--s1)` that matplotlib accepts as a colour; `_svg` puts the variable back."""
    return f"#03{ord(colour[6]):02x}{int(colour[7]):02x}"


def curves(
    name: str, series: Mapping[str, Mapping[int, float]], log: bool = False, smooth: bool = True, zero: bool = False
) -> Markup:
    """Lines over steps, a colour each; noisy ones (over 40 points) thin, with their running mean above."""
    with _axes() as (figure, axes):
        for index, points in enumerate(series.values()):
            colour = _mark(series_colour(index))
            x, y = list(points), list(points.values())
            noisy = smooth and len(y) > 40
            marker = "o" if len(y) < 12 else ""
            axes.plot(
                x,
                y,
                color=colour,
                linewidth=0.8 if noisy else 1.8,
                alpha=0.35 if noisy else 1,
                marker=marker,
                markersize=3.5,
            )
            if noisy:
                axes.plot(x, running_mean(y, max(3, len(y) // 25)), color=colour, linewidth=1.9)
        if log:
            axes.set_yscale("log")
        axes.margins(x=0.01)
        if zero:
            axes.set_ylim(0, 1.08 * max((max(points.values()) for points in series.values()), default=1.0))
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(5, integer=True))
        if not log:
            axes.yaxis.set_major_locator(_ticker().MaxNLocator(5))
        _plain_numbers(axes)
        return _svg(figure, name)


def over_rates(name: str, points: Sequence[Sequence[float]], suggested: float) -> Markup:
    """A rate range test: the loss over the logarithm of the rate, each point faint, smoothed strong (rate, loss,
    smoothed), and a line at the rate that is suggested."""
    with _axes() as (figure, axes):
        rates, losses, smoothed = zip(*points, strict=True)
        colour = _mark(series_colour(0))
        axes.plot(rates, losses, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(rates, smoothed, color=colour, linewidth=1.9)
        axes.axvline(suggested, color=_mark(series_colour(1)), linewidth=1.2, linestyle="--")
        axes.set_xscale("log")
        axes.margins(x=0.01)
        axes.yaxis.set_major_locator(_ticker().MaxNLocator(5))
        _plain_numbers(axes)
        return _svg(figure, name)


def law(name: str, study: Mapping[str, Any]) -> Markup:
    """A scaling law: losses over 6·N·D operations, what the law says of each run beside it, and the larger run that it
    was checked on, a ring, with the interval that it should lie in."""
    with _axes() as (figure, axes):
        points = sorted(study["points"], key=lambda point: float(point["parameters"]) * float(point["tokens"]))
        sizes = sorted({point["parameters"] for point in points})
        for size in sizes:
            row = [point for point in points if point["parameters"] == size]
            spent = [6 * point["parameters"] * point["tokens"] for point in row]
            axes.plot(spent, [point["predicted"] for point in row], color=_mark(series_colour(0)), linewidth=0.9)
            axes.plot(spent, [point["loss"] for point in row], "o", color=_mark(series_colour(0)), markersize=4)
        if check := study.get("check"):
            place = 6 * check["parameters"] * check["tokens"]
            axes.vlines(place, study["predicted_low"], study["predicted_high"], color=_mark(series_colour(1)))
            axes.plot([place], [check["loss"]], "o", color=_mark(series_colour(1)), markerfacecolor="none")
        axes.set_xscale("log")
        axes.yaxis.set_major_locator(_ticker().MaxNLocator(5))
        _plain_numbers(axes)
        return _svg(figure, name)


MOST_COLUMNS = 48


def heat(name: str, rows: Mapping[str, Mapping[int, float]], log: bool = False) -> tuple[Markup, float, float]:
    """A field for every row (layer) and step, the stronger the larger; with the values of the faintest and strongest.

    More steps than fit are thinned out evenly. With `log` the strength follows the logarithm. Negative values stand for
    their size. A value that is missing or not finite leaves its field empty.
    """
    steps = sorted({step for points in rows.values() for step in points})
    if len(steps) > MOST_COLUMNS:
        steps = [steps[(i * (len(steps) - 1)) // (MOST_COLUMNS - 1)] for i in range(MOST_COLUMNS)]
    values = [[abs(points.get(step, math.nan)) for step in steps] for points in rows.values()]
    shown = [v for row in values for v in row if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(shown), max(shown)) if shown else (0.0, 0.0)
    with _axes((SIZE[0], 0.55 + 0.2 * max(3, len(rows)))) as (figure, axes):
        from matplotlib.patches import Rectangle

        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    strength = _strength(value, low, high, log)
                    field = Rectangle((x - 0.5, y - 0.46), 1, 0.92, color=_mark(series_colour(0)), linewidth=0)
                    field.set_alpha(round(0.05 + 0.95 * strength, 2))
                    axes.add_patch(field)
        axes.set_xlim(-0.5, max(0.5, len(steps) - 0.5))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        every = max(1, -(-len(rows) // 16))
        axes.set_yticks(range(0, len(rows), every), list(rows)[::every], fontsize=8)
        ticks = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)}) if steps else []
        axes.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
        axes.grid(visible=False)
        return _svg(figure, name), low, high


def _strength(value: float, low: float, high: float, log: bool) -> float:
    """Where a value lies between the lowest and the highest, from 0 to 1."""
    if high <= low:
        return 1.0 if value > 0 else 0.0
    if not log:
        return (value - low) / (high - low)
    return math.log(max(value, low) / low) / math.log(high / low)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at every place."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means


def grouped_bars(name: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> Markup:
    """For every group (language) a lying bar of every series (by its colour), with its number at the end."""
    height = 0.45 + len(groups) * (0.24 * len(series) + 0.22)
    with _axes((SIZE[0], height)) as (figure, axes):
        place, ticks = 0.0, []
        highest = max((v for values in series.values() for v in values if v is not None), default=1.0)
        for group, label in enumerate(groups):
            first = place
            for colour, values in series.items():
                value = values[group]
                if value is not None:
                    axes.barh(place, value, height=0.8, color=_mark(colour))
                    axes.text(value + highest * 0.012, place, f"{value:.2f}", va="center", fontsize=8.5, color=_INK)
                place += 1
            ticks.append(((first + place - 1) / 2, label))
            place += 0.9
        axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=10)
        axes.invert_yaxis()
        axes.set_xlim(0, highest * 1.12)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        return _svg(figure, name)


def intervals(name: str, rows: Sequence[tuple[str, float, float, float]], baseline: float | None) -> Markup:
    """A point with its interval for every row (label, value, low, high), and a dashed line at the baseline."""
    with _axes((SIZE[0], 0.5 + 0.3 * len(rows))) as (figure, axes):
        for place, (_, value, low, high) in enumerate(rows):
            axes.plot(
                [low, high],
                [place, place],
                color=_mark(series_colour(0)),
                linewidth=2.4,
                solid_capstyle="round",
                alpha=0.55,
            )
            axes.plot([value], [place], "o", color=_mark(series_colour(0)), markersize=5.5)
        if baseline is not None:
            axes.axvline(baseline, color=_INK, linewidth=1, linestyle=(0, (3, 3)))
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=9.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        return _svg(figure, name)


# --- matplotlib, kept in one place ---------------------------------------------------------------------------------


class _axes:
    """A figure in our style, without pyplot's global state."""

    def __init__(self, size: tuple[float, float] = SIZE) -> None:
        self.size = size

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self.style = mpl.rc_context(STYLE)
        self.style.__enter__()
        figure = Figure(figsize=self.size, dpi=100, layout="constrained")
        return figure, figure.subplots()

    def __exit__(self, *error: object) -> None:
        self.style.__exit__(None, None, None)


def _ticker() -> Any:
    import matplotlib.ticker as ticker

    return ticker


def _plain_numbers(axes: Any) -> None:
    """1k and 2.5M instead of exponents and offsets."""

    def show(value: float, _: int) -> str:
        if value == 0 or not math.isfinite(value):
            return "0"
        for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{unit}"
        return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_ticker().FuncFormatter(show))
        axis.set_minor_formatter(_ticker().NullFormatter())


def _svg(figure: Any, name: str) -> Markup:
    """The figure as an <svg> for inside a page: no prologue, no dates, own ids, the page's font and colours."""
    import warnings

    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # Chinese names: the reader's browser has the font
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for index in range(COLOURS):
        text = text.replace(_mark(series_colour(index)), series_colour(index))
        text = text.replace(_mark(series_colour(index, True)), series_colour(index, True))
    text = text.replace(_INK, "var(--ink-soft)").replace(_GRID, "var(--line)")
    box = text[text.index("viewBox=") + 9 : text.index(">")].partition('"')[0]
    opening = f'<svg viewBox="{box}" style="max-width: {float(box.split()[2]) * 4 / 3:.0f}px" role="img" xmlns:xlink="http://www.w3.org/1999/xlink">'
    text = opening + text[text.index(">") + 1 :]
    return Markup(re.sub(r"\n\s*", "\n", text))
