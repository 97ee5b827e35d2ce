"""How the terminal carries out a recipe: the plan, the live lines, the report, what to do next."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from fledge.cli.console import Console, plan_summary, plan_table
from fledge.cli.view import print_forecasts, print_summary
from fledge.core.language import t
from fledge.core.launch import Launched
from fledge.core.listeners import chosen, open_listeners
from fledge.core.plan import Plan, make_plan
from fledge.core.recipe import Recipe
from fledge.core.runner import Runner
from fledge.core.store import Store


def carry_out(
    recipe: Recipe, store: Store, until: str = "", start: str = "", command: str = "fledge run", log: str | None = None,
    group: Launched | None = None,
) -> dict[str, Path]:  # fmt: skip
    """Plan, run, report. The artifacts' folders by stage. `log` names programs that hear the events, with commas.
    `group` is that of a launcher that has started us."""
    names = chosen(log, recipe.log)
    plan = make_plan(recipe, store, until, start)
    console = Console()
    if plan.to_make:
        console.rich.print(plan_table(plan))
    console.rich.print(plan_summary(plan), style="bold")
    for step in plan.to_make:
        for note in step.estimate.notes:
            console.rich.print(f"  {step.name}: {note}", style="yellow")
    plan.refuse_what_cannot_fit()
    signal.signal(signal.SIGTERM, interrupted)
    listeners = open_listeners(names, plan, store)
    runner = Runner(plan, store, [console, *listeners], command, group)
    try:
        paths = runner.run()
    finally:
        console.close()
        for listener in listeners:
            listener.close()
            if trouble := getattr(listener, "trouble", ""):
                name = type(listener).__name__
                console.rich.print(t("{program} heard no more: {reason}", program=name, reason=trouble), style="yellow")
    print_forecasts(recipe.name, {step.name for step in plan.to_make}, store, console.rich)
    if len(recipe.nodes) > 1:
        _report(plan, store, console)
    return paths


def interrupted(signum: int, frame: object) -> None:
    """SIGTERM is Ctrl-C from far away."""
    raise KeyboardInterrupt


def _report(plan: Plan, store: Store, console: Console) -> None:
    """Write the report where something new was made (in a process of its own: plotting is slow to import)."""
    folder = store.runs / plan.recipe.name
    if plan.to_make or not (folder / "report.html").exists():
        with console.rich.status(t("writing the report")):
            done = subprocess.run(
                [sys.executable, "-m", "fledge.cli.view", plan.recipe.name], capture_output=True, text=True, check=False
            )
        if done.returncode:
            (folder / "report.log").write_text(done.stderr, encoding="utf-8")
            console.rich.print(
                t("the report could not be written; see {file}", file=folder / "report.log"), style="yellow"
            )
    print_summary(plan.recipe.name, store, console.rich)
