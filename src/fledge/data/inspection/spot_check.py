"""A spot check: rows that were kept and rows that were rejected, judged by a person, and how sure the rates are.

`write_table` makes a table with an empty column `wrong`; a person writes y where the decision was wrong, n where it
was right; `Verdicts.read` says how often it was wrong, with Wilson's interval.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.intervals import Interval, wilson
from fledge.core.language import t

COLUMNS = ("wrong", "decision", "step", "reason", "value", "id", "text")
SHOWN = 2_000
"""Characters of a row that a judge sees."""
YES = ("y", "yes", "1", "true", "wrong", "x", "是", "错")
NO = ("n", "no", "0", "false", "right", "ok", "否", "对")


@dataclass(frozen=True)
class Row:
    """One row to judge: kept (no step, no reason), or rejected by a step for a reason."""

    id: str
    text: str
    step: str = ""
    reason: str = ""
    value: str = ""

    @property
    def decision(self) -> str:
        """kept or rejected."""
        return "rejected" if self.step else "kept"


@dataclass(frozen=True)
class Spot:
    """Rows chosen at random from what was kept and from what was rejected."""

    kept: list[Row] = field(default_factory=list)
    rejected: list[Row] = field(default_factory=list)


def rejected_row(row: dict[str, Any]) -> Row:
    """A row of `read_rejects` as a judge sees it: its texts, without the JSON around them."""
    return Row(row["where"], _texts(row["row"])[:SHOWN], row["step"], row["reason"], row["value"])


def _texts(raw: str) -> str:
    """What people wrote in a rejected record; the raw line where it is none."""
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    if not isinstance(row, dict):
        return raw
    turns = [turn for key in ("messages", "prompt", "answers") if isinstance(row.get(key), list) for turn in row[key]]
    said = [turn["content"] for turn in turns if isinstance(turn, dict) and isinstance(turn.get("content"), str)]
    said += [row[key] for key in ("text", "answer") if isinstance(row.get(key), str)]
    return "\n".join(filter(None, said)) or raw


def write_table(spot: Spot, file: Path) -> int:
    """Write the rows as CSV with an empty column `wrong`; returns how many."""
    rows = [*spot.kept, *spot.rejected]
    with file.open("w", encoding="utf-8-sig", newline="") as out:  # the mark tells spreadsheets that it is UTF-8
        table = csv.writer(out)
        table.writerow(COLUMNS)
        for row in rows:
            table.writerow(["", row.decision, row.step, row.reason, row.value, row.id, _harmless(row.text)])
    return len(rows)


def _harmless(text: str) -> str:
    """A spreadsheet takes a cell that begins so for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


@dataclass(frozen=True)
class Verdicts:
    """How often keeping, rejecting, and each step's rejecting was judged wrong."""

    kept: Interval | None
    rejected: Interval | None
    steps: dict[str, Interval]
    unjudged: int

    @classmethod
    def read(cls, file: Path) -> Verdicts:
        """From a judged table. Raises FledgeError that names the line of a verdict that says neither yes nor no."""
        counts: Counter[tuple[str, bool]] = Counter()
        unjudged = 0
        try:
            with file.open(encoding="utf-8-sig", newline="") as source:
                rows = list(csv.DictReader(source))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise FledgeError(Problem(t("the file cannot be read"), where=str(file), found=str(error))) from None
        if rows and not {"wrong", "decision", "step"} <= rows[0].keys():
            raise FledgeError(Problem(t("is not a table of a spot check"), where=str(file), allowed=", ".join(COLUMNS)))
        for number, row in enumerate(rows, 1):
            said = (row["wrong"] or "").strip().lower()
            if not said:
                unjudged += 1
                continue
            if said not in (*YES, *NO):
                allowed = f"{', '.join(YES)}; {', '.join(NO)}"
                where = f"{file}: {number}"
                raise FledgeError(Problem(t("the verdict says neither yes nor no"), where, found=said, allowed=allowed))
            names = ["kept"] if row["decision"] == "kept" else ["rejected", f"step {row['step']}"]
            counts.update((name, said in YES) for name in names)
        rates = {name: wilson(counts[name, True], counts[name, True] + counts[name, False]) for name, _ in counts}
        steps = {name.removeprefix("step "): rate for name, rate in sorted(rates.items()) if name.startswith("step ")}
        return cls(rates.get("kept"), rates.get("rejected"), steps, unjudged)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """The rates for a terminal."""
        lines = [t("judged by hand (95 % intervals):")]
        for name, rate in ((t("wrongly kept"), self.kept), (t("wrongly rejected"), self.rejected)):
            lines.append(f"  {name}: {said(rate)}")
        lines += [f"    {step}: {said(rate)}" for step, rate in self.steps.items()]
        if self.unjudged:
            lines.append("  " + t("not judged yet: {rows}", rows=self.unjudged))
        return "\n".join(lines)


def said(rate: Interval | None) -> str:
    """`4.0 % (0.7–19.5, n = 25)`."""
    if rate is None:
        return "—"
    return f"{100 * rate.value:.1f} % ({100 * rate.low:.1f}–{100 * rate.high:.1f}, n = {rate.n})"
