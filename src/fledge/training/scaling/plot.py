"""A law as a picture: measured losses, the law through them, the run it was checked on with its interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fledge.training.scaling.law import Fit, Point
from fledge.training.search.plot import BLUE, GREY, RED


def plot_law(fit: Fit, check: Point | None, file: Path) -> None:
    """Write the picture as SVG: the loss over 6·N·D operations, a line for each size; the same bytes each time."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "fledge", "svg.fonttype": "none"}):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        points = list(fit.points)
        most = max(p.tokens for p in [*points, *([check] if check else [])])
        for size in sorted({p.parameters for p in points} | ({check.parameters} if check else set())):
            tokens = np.geomspace(min(p.tokens for p in points), most, 60)
            axes.plot(6 * size * tokens, [fit.law.loss(size, d) for d in tokens], color=GREY, linewidth=0.8)
        spent = [6 * p.parameters * p.tokens for p in points]
        axes.plot(spent, [p.loss for p in points], "o", color=BLUE, markersize=4)
        if check:
            said, place = fit.predict(check.parameters, check.tokens), 6 * check.parameters * check.tokens
            axes.vlines(place, said.low, said.high, color=RED, linewidth=2)
            axes.plot([place], [check.loss], "o", color=RED, markersize=6, markerfacecolor="none")
        axes.set_xscale("log")
        axes.set_xlabel("6·N·D")
        axes.set_ylabel("loss")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None})
