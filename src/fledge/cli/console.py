"""What a person sees while a recipe runs: one line a stage with a rate and a time to go, the loss as it falls.

On a terminal the running stage's line is alive; in a file or a pipe a line is printed when a stage starts and ends,
and every ten seconds between.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fledge.core.events import Event
from fledge.core.language import t
from fledge.core.plan import Plan
from fledge.core.units import show_bytes, show_count, show_seconds

_BARS = "▁▂▃▄▅▆▇█"
_SIGNS = {"made": ("✓", "green"), "cached": ("·", "dim"), "failed": ("✗", "red"), "interrupted": ("‖", "yellow")}


@dataclass
class StageLine:
    """What is known of the running stage."""

    name: str
    started: float = field(default_factory=time.monotonic)
    unit: str = ""
    done: float = 0
    total: float | None = None
    first: tuple[float, float] | None = (
        None  # (when, done) at the first progress of this unit: a resumed stage starts late
    )
    losses: list[float] = field(default_factory=list)
    sources: dict[str, float] = field(default_factory=dict)  # the last loss of each source of a mixture
    tokens_per_second: float = 0.0
    mfu: float = 0.0

    def hear(self, event: Event) -> None:
        """Take in progress and losses."""
        if event.kind == "progress":
            if event.name != self.unit or event.value < self.done or self.first is None:
                self.unit, self.first = event.name, (time.monotonic(), float(event.value))
            self.done, self.total = float(event.value), event.data.get("total")
            self.tokens_per_second = event.data.get("tokens_per_second") or 0.0
            self.mfu = event.data.get("mfu") or 0.0
        elif event.kind == "metric" and event.name.startswith("loss/"):
            self.sources[event.name.removeprefix("loss/")] = float(event.value)
        elif event.kind == "metric" and event.name == "loss" and event.step is not None:
            self.losses.append(float(event.value))

    def rate(self) -> float:
        """Units per second since the first sign of progress."""
        if self.first is None or (elapsed := time.monotonic() - self.first[0]) <= 0:
            return 0.0
        return (self.done - self.first[1]) / elapsed

    def text(self) -> str:
        """`base  1,200 / 3,000 steps  40%  3.1/s  2 min left  15.9k tokens/s  MFU 41%  ▇▅▃▂ 3.21  en 3.02  zh 3.40`."""
        parts = [f"{self.name:<14}", show_seconds(time.monotonic() - self.started)]
        if self.unit:
            amount = f"{self.done:,.0f}" + (f" / {self.total:,.0f}" if self.total else "")
            parts.append(f"{amount} {t(self.unit)}")
            if self.total:
                parts.append(f"{100 * self.done / self.total:.0f}%")
            rate = self.rate()
            if rate > 0:
                parts.append(f"{show_count(rate)}/s")
                if self.total and self.done < self.total:
                    parts.append(t("{time} left", time=show_seconds((self.total - self.done) / rate)))
        if self.tokens_per_second:
            parts.append(t("{rate} tokens/s", rate=show_count(self.tokens_per_second)))
        if self.mfu:
            parts.append(f"MFU {100 * self.mfu:.0f}%")
        if self.losses:
            parts.append(f"{spark(self.losses)} {self.losses[-1]:.3f}")
        parts += [f"{name} {loss:.3f}" for name, loss in list(self.sources.items())[:4]]
        return "  ".join(parts)


def spark(values: list[float], width: int = 16) -> str:
    """A curve in one line of text."""
    if len(values) > width:
        step = len(values) / width
        values = [values[int((i + 1) * step) - 1] for i in range(width)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[round((v - low) / span * (len(_BARS) - 1))] for v in values)


def terminal(quiet: bool = False) -> RichConsole:
    """Where to print: as wide as the terminal, and wide enough for a table where there is none."""
    console = RichConsole(highlight=False, soft_wrap=True, quiet=quiet)
    return console if console.is_terminal else RichConsole(highlight=False, soft_wrap=True, quiet=quiet, width=140)


class Console:
    """The listener behind `fledge run`."""

    def __init__(self, quiet: bool = False) -> None:
        self.rich = terminal(quiet)
        self.live: Live | None = None
        self.line: StageLine | None = None
        self._printed = 0.0

    def hear(self, event: Event) -> None:
        """Show one event."""
        if event.kind == "stage":
            self._stage(event)
        elif self.line is not None:
            self.line.hear(event)
            if event.kind == "message":
                self.rich.print(Text(f"  {event.value}", style="yellow" if event.name == "warning" else ""))
            self._refresh()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _stage(self, event: Event) -> None:
        if event.name in ("running", "waiting"):
            self.line, self._printed = StageLine(event.stage), time.monotonic()
            text = Text("▸ ", style="cyan").append(event.stage, style="bold")
            self.rich.print(text.append(f"  {event.value}" if event.value else "", style="dim"))
            if self.rich.is_terminal and self.live is None:
                self.live = Live(
                    console=self.rich,
                    transient=True,
                    refresh_per_second=8,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self.live.start()
            return
        self.close()
        sign, style = _SIGNS[event.name]
        words = {"made": t("made"), "cached": t("is there"), "failed": t("failed"), "interrupted": t("stopped")}
        line = (
            Text(f"{sign} ", style=style)
            .append(f"{event.stage:<14}", style="bold")
            .append(f" {words[event.name]}", style=style)
        )
        if event.name == "made":
            line.append(f"  {show_seconds(event.data['seconds'])}")
            if self.line is not None and self.line.losses:
                line.append(f"  {spark(self.line.losses)} {self.line.losses[-1]:.3f}", style="dim")
        self.rich.print(line)
        self.line = None

    def _refresh(self) -> None:
        assert self.line is not None
        if self.live is not None:
            self.live.update(Text("  " + self.line.text()))
        elif time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            self.rich.print(Text("  " + self.line.text()))


def plan_table(plan: Plan) -> Table:
    """The plan as a table: what will be made, what is there, and why not."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, justify in (
        (t("stage"), "left"),
        (t("what"), "left"),
        (t("status"), "left"),
        (t("time"), "right"),
        (t("memory"), "right"),
        (t("disk"), "right"),
        (t("why"), "left"),
    ):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    words = {"cached": t("is there"), "resume": t("goes on"), "make": t("will be made")}
    for step in plan.steps:
        made = step.status != "cached"
        estimate = step.estimate
        table.add_row(
            Text(step.name, style="bold" if made else "dim"),
            step.use,
            Text(words[step.status], style="" if made else "dim"),
            time_range(estimate.seconds) if made else "",
            show_bytes(estimate.memory[1]) if made else "",
            show_bytes(estimate.disk) if made else "",
            "\n".join(step.why),
        )
    return table


def plan_summary(plan: Plan) -> str:
    """`11 of 13 stages to make, 6–9 min, up to 3.1 GB of memory, 120 MB of disk`."""
    if not plan.to_make:
        return t("everything is there ({count} stages)", count=len(plan.steps))
    total = plan.total()
    return t(
        "{made} of {count} stages to make: about {time}, up to {memory} of memory, {disk} of disk",
        made=len(plan.to_make), count=len(plan.steps), time=time_range(total.seconds),
        memory=show_bytes(total.memory[1]), disk=show_bytes(total.disk),
    )  # fmt: skip


def time_range(seconds: tuple[float, float]) -> str:
    """`12 s – 40 s`."""
    low, high = show_seconds(max(1, seconds[0])), show_seconds(max(1, seconds[1]))
    return low if low == high else f"{low} – {high}"


def error_text(problems: Any) -> Text:
    """Problems as they are printed: the first line in red, what helps below it."""
    text = Text()
    for index, problem in enumerate(problems):
        first, *rest = str(problem).split("\n")
        text.append("\n" if index else "").append("✗ ", style="red bold").append(first, style="red")
        for line in rest:
            text.append(f"\n{line}")
    return text
