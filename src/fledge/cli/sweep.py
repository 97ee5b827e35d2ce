"""`fledge sweep`: which settings of a recipe are best, a line for every trial and the best of them as `--set`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console as RichConsole
from rich.table import Table

from fledge.cli.console import StageLine, terminal
from fledge.cli.running import interrupted
from fledge.core.errors import FledgeError, Problem
from fledge.core.events import Event
from fledge.core.language import t
from fledge.core.store import Store
from fledge.core.units import show_seconds
from fledge.training.search.pruning import Rule
from fledge.training.search.samplers import Method
from fledge.training.search.space import parse
from fledge.training.search.sweep import Goal, Sweep, settings_of
from fledge.training.search.trial import Trial

SHOWN = 10
"""Trials in the table at the end."""


def run_sweep(
    file: Path,
    vary: Sequence[str],
    minimize: str,
    maximize: str,
    trials: int,
    method: Method,
    seed: int,
    stop: Rule | None,
    watch: str,
    settings: Sequence[str],
) -> None:
    """Carry a sweep out, or go on with it, and say what was best."""
    if bool(minimize) == bool(maximize):
        raise FledgeError(Problem(t("a sweep has one goal: --minimize or --maximize"), found=f"{minimize} {maximize}"))
    console = terminal()
    ear = _Ear(console)
    sweep = Sweep(
        file, [parse(text) for text in vary], Goal.parse(minimize or maximize, maximize=bool(maximize)), trials,
        Store(), settings, method, seed, stop, Goal.parse(watch) if watch else None, [ear],
    )  # fmt: skip
    signal.signal(signal.SIGTERM, interrupted)
    done: list[Trial] = []

    def told(trial: Trial) -> None:
        ear.quiet()
        done.append(trial)
        console.print(_line(trial, sweep, done))

    try:
        found = sweep.run(told)
    finally:
        ear.quiet()
    console.print(_table(found, sweep))
    best = sweep.best(found)
    if best is None:
        raise FledgeError(Problem(t("no trial came to its end"), where=str(sweep.folder / "sweep.csv")))
    line = " ".join(f"--set {setting}" for setting in settings_of(best.values))
    console.print(t("the best, as a recipe takes it:"), style="bold")
    click.echo(f"fledge run {file} {line}")
    console.print(t("all trials and their plot are in {folder}", folder=sweep.folder), style="dim")


def _line(trial: Trial, sweep: Sweep, done: Sequence[Trial]) -> str:
    """`trial 3 of 20  lr=0.001  2.31  best 2.28  41 s`."""
    words = {"complete": "", "pruned": t("stopped early"), "failed": t("failed")}
    best = sweep.best(done)
    parts = [t("trial {number} of {count}", number=trial.number + 1, count=sweep.trials), *_settings(trial)]
    parts += [f"{trial.value:.5g}"] if trial.value is not None else [words[trial.state]]
    parts += [t("best {value}", value=f"{best.value:.5g}")] if best else []
    return "  ".join([*parts, show_seconds(trial.seconds), *([trial.reason[:200]] if trial.reason else [])])


def _settings(trial: Trial) -> list[str]:
    pairs = (setting.split("=", 1) for setting in settings_of(trial.values))
    return [f"{key.rpartition('.')[2]}={value}" for key, value in pairs]


def _table(trials: Sequence[Trial], sweep: Sweep) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (t("trial"), *(dimension.key for dimension in sweep.space), sweep.goal.metric, t("time")):
        table.add_column(name, justify="right")
    ended = [trial for trial in trials if trial.value is not None]
    ended.sort(key=lambda trial: (trial.value or 0.0) * (-1 if sweep.goal.maximize else 1))
    for place, trial in enumerate(ended[:SHOWN]):
        values = [setting.partition("=")[2] for setting in settings_of(trial.values)]
        table.add_row(
            str(trial.number + 1), *values, f"{trial.value:.5g}", show_seconds(trial.seconds),
            style="bold" if not place else "",
        )  # fmt: skip
    return table


class _Ear:
    """The running stage in one live line, on a terminal."""

    def __init__(self, console: RichConsole) -> None:
        self.console, self.line = console, StageLine("")
        self.status: Any = None

    def hear(self, event: Event) -> None:
        if not self.console.is_terminal:
            return
        if event.kind == "stage" and event.name == "running":
            self.line = StageLine(event.stage)
        self.line.hear(event)
        if self.status is None:
            self.status = self.console.status("")
            self.status.start()
        self.status.update(self.line.text())

    def quiet(self) -> None:
        """Leave the terminal as it was."""
        if self.status is not None:
            self.status.stop()
            self.status = None
