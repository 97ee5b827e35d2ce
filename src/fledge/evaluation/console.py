"""The table at the end of a run, in the terminal: a column a model, a line a number, so that it fits 80 characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fledge.core.language import t
from fledge.evaluation.run_view import RunView
from fledge.evaluation.side_by_side import Cell, Column, SideBySide, side_by_side

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def models_table(run: RunView) -> Table | None:
    """Every model of the run side by side and the best baseline of every line; None when nothing was evaluated."""
    from rich.table import Table

    found = side_by_side(run)
    if not found.models:
        return None
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
        title=t("The models of this run"),
        title_justify="left",
        title_style="bold",
    )
    table.add_column("", style="dim")
    for row in found.models:
        table.add_column(row.name.here(), justify="right", no_wrap=True)
    table.add_column(t("to beat"), style="dim")
    for column in found.columns:
        if column.main:
            cells = [row.cells.get(column.key) for row in found.models]
            table.add_row(column.title.here(), *map(_text, cells), _to_beat(found, column))
    return table


def _to_beat(found: SideBySide, column: Column) -> str:
    """The best baseline: `2.310 n-gram model …`."""
    rows = [row for row in found.baselines if column.key in row.cells]
    best = min(rows, key=lambda row: -column.better * row.cells[column.key].value, default=None)
    return f"{best.cells[column.key].text} {best.name.here()}" if best else ""


def _text(cell: Cell | None) -> Text:
    from rich.text import Text

    if cell is None:
        return Text("")
    text = Text(cell.text, "bold green" if cell.best else "")
    return text.append(f"\n{cell.interval}", "dim") if cell.interval and cell.unit == "share" else text
