"""A sweep as a picture: the goal trial by trial, and over every setting. The same bytes for the same trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fledge.training.search.space import Dimension, Range
from fledge.training.search.trial import Trial

BLUE, RED, GREY = "#2a6fbb", "#c0392b", "0.6"


def plot_sweep(space: Sequence[Dimension], goal: str, trials: Sequence[Trial], best: Trial, file: Path) -> None:
    """Write the picture as SVG; the best trial in red."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "fledge", "svg.fonttype": "none"}):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2 * (1 + len(space)), 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 1 + len(space), sharey=True, squeeze=False)[0]
        whole = [trial for trial in trials if trial.value is not None]
        values = [trial.value for trial in whole]
        panels[0].plot([trial.number for trial in whole], values, "o", color=BLUE, markersize=4)
        for trial in trials:
            if trial.value is None:
                panels[0].axvline(trial.number, color=GREY, linestyle=":", linewidth=1)
        panels[0].plot([best.number], [best.value], "o", color=RED, markersize=6)
        panels[0].set_xlabel("trial")
        panels[0].set_ylabel(goal)
        for axes, dimension in zip(panels[1:], space, strict=True):
            places = [trial.values[dimension.key] for trial in whole]
            axes.plot(places, values, "o", color=BLUE, markersize=4)
            axes.plot([best.values[dimension.key]], [best.value], "o", color=RED, markersize=6)
            axes.set_xlabel(dimension.key)
            if isinstance(dimension, Range) and dimension.log:
                axes.set_xscale("log")
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None})
