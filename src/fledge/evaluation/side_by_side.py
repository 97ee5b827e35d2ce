"""Every model of a run in one table, with the baselines below: what the report and the console show first. Light."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fledge.core.units import show_bytes, show_count
from fledge.evaluation.bilingual import Both, language_name, plain, say
from fledge.evaluation.run_view import RunView

Unit = Literal["number", "share", "bytes", "count"]


@dataclass(frozen=True)
class Column:
    """One metric. `better` is −1 where less is better, 1 where more is, 0 where it is only a fact."""

    key: str
    title: Both
    unit: Unit
    better: int = 0
    main: bool = True  # False: left out where there is little room


@dataclass(frozen=True)
class Cell:
    """One number, with its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: Unit = "number"
    best: bool = False

    @property
    def text(self) -> str:
        """The number as a person reads it."""
        return _show(self.value, self.unit)

    @property
    def interval(self) -> str:
        """`58–66 %`, or nothing."""
        if self.low is None or self.high is None:
            return ""
        if self.unit == "share":
            return f"{100 * self.low:.0f}–{100 * self.high:.0f} %"
        return f"{_show(self.low, self.unit)}–{_show(self.high, self.unit)}"


@dataclass(frozen=True)
class Row:
    """One model or one baseline."""

    name: Both
    cells: Mapping[str, Cell]
    kind: Literal["model", "reward-model", "baseline"] = "model"
    chat: bool = True


@dataclass(frozen=True)
class SideBySide:
    """The whole table."""

    columns: Sequence[Column] = ()
    rows: Sequence[Row] = ()

    @property
    def models(self) -> list[Row]:
        return [row for row in self.rows if row.kind != "baseline"]

    @property
    def baselines(self) -> list[Row]:
        return [row for row in self.rows if row.kind == "baseline"]

    def row(self, name: str) -> Row | None:
        """The model or baseline of that name."""
        return next((row for row in self.rows if row.name.en == name), None)


@dataclass
class _Table:
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)  # row → metric → number
    kinds: dict[str, str] = field(default_factory=dict)
    chats: dict[str, bool] = field(default_factory=dict)
    tasks: dict[str, str] = field(default_factory=dict)  # key → task


def side_by_side(run: RunView) -> SideBySide:
    """The table of a run, from its evaluations and, for what they did not ask, from its training stages."""
    table = _Table()
    for scores in run.scores():
        for name, row in scores["models"].items():
            table.kinds[name], table.chats[name] = row["kind"], row.get("chat", True)
            facts = {key: row[key] for key in ("parameters", "bytes") if key in row}
            table.metrics.setdefault(name, {}).update({**facts, **row["metrics"]})
        for task in scores["tasks"]:
            table.tasks[task["key"]] = task["task"]
            for name, numbers in task["baselines"].items():
                _add_baseline(table, name, numbers)
    for stage in run.made_by("train.pretrain"):
        if not run.scores() and stage.done:
            table.kinds[stage.name] = "model"
            own = {k: v for k, v in stage.metrics.items() if k == "parameters" or k.startswith("bits_per_byte_")}
            table.metrics[stage.name] = own
        for name, prefix in (("untrained", "untrained_"), ("ngram", "ngram_"), ("xz", "xz_")):
            numbers = {
                k.removeprefix(prefix): v for k, v in stage.metrics.items() if k.startswith(f"{prefix}bits_per_byte_")
            }
            _add_baseline(table, name, {k: v for k, v in numbers.items() if k not in table.metrics.get(name, {})})
    keys = [key for metrics in table.metrics.values() for key in metrics]
    columns = [column for key in dict.fromkeys(keys) if (column := describe(key, table.tasks))]
    columns.sort(key=lambda column: (not column.main, *_order(column.key, table.tasks)))
    return SideBySide(columns, _rows(table, columns))


def _add_baseline(table: _Table, name: str, numbers: Mapping[str, Any]) -> None:
    if numbers:
        table.metrics.setdefault(name, {}).update(numbers)
        table.kinds.setdefault(name, "baseline")


def _rows(table: _Table, columns: Sequence[Column]) -> list[Row]:
    best = {column.key: _best(column, table) for column in columns}
    rows = []
    for name, metrics in table.metrics.items():
        cells = {
            column.key: _cell(metrics[column.key], column, best[column.key], table.kinds[name])
            for column in columns
            if metrics.get(column.key) is not None
        }
        title = baseline_name(name) if table.kinds[name] == "baseline" else plain(name)
        rows.append(Row(title, cells, table.kinds[name], table.chats.get(name, True)))  # type: ignore[arg-type]
    kinds = ["model", "reward-model", "baseline"]
    return sorted(rows, key=lambda row: (kinds.index(row.kind), _BASELINES.get(row.name.en, 9)))


def _best(column: Column, table: _Table) -> float | None:
    values = [
        _value(metrics[column.key])
        for name, metrics in table.metrics.items()
        if table.kinds[name] == "model" and metrics.get(column.key) is not None
    ]
    return (max if column.better > 0 else min)(values) if column.better and len(values) > 1 else None


def _value(number: Any) -> float:
    return float(number["value"] if isinstance(number, Mapping) else number)


def _cell(number: Any, column: Column, best: float | None, kind: str) -> Cell:
    is_best = kind == "model" and best is not None and _value(number) == best
    if isinstance(number, Mapping):
        return Cell(number["value"], number["low"], number["high"], number["n"], column.unit, is_best)
    return Cell(float(number), unit=column.unit, best=is_best)


def _show(value: float, unit: Unit) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "bytes":
        return show_bytes(value)
    if unit == "count":
        return show_count(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def describe(key: str, tasks: Mapping[str, str]) -> Column | None:
    """What a metric is called, and which way is better; None for those that only the details show."""
    if key == "parameters":
        return Column(key, say("parameters"), "count")
    if key == "bytes":
        return Column(key, say("size on disk"), "bytes")
    if match := re.fullmatch(r"(.*_)?bits_per_byte_(\w+)", key):
        return Column(key, say("bits per byte, {language}", language=language_name(match[2])), "number", -1)
    name = next(
        (name for name in sorted(tasks, key=len, reverse=True) if key == name or key.startswith(f"{name}_")), ""
    )
    if (part := re.fullmatch(r"(.+)_(clean|contaminated)", name)) and tasks.get(part[1]) == tasks[name]:
        whole = describe(part[1] + key.removeprefix(name), tasks)
        clean = part[2] == "clean"
        return whole and replace(
            whole,
            key=key,
            title=say("{metric}, clean items", metric=whole.title)
            if clean
            else say("{metric}, contaminated items", metric=whole.title),
            main=False,
        )
    rest = key.removeprefix(name).removeprefix("_")
    match tasks.get(name), rest:
        case "answer_loss", "":
            return Column(key, say("answer loss"), "number", -1)
        case "answer_loss", lang:
            return Column(key, say("answer loss, {language}", language=language_name(lang)), "number", -1, main=False)
        case "preference_accuracy", "":
            return Column(key, say("preference accuracy"), "share", 1)
        case "preference_accuracy", "likelier":
            return Column(key, say("preferred answer likelier"), "share", 1, main=False)
        case "choice", "acc":
            return Column(key, plain(task_title(name)), "share", 1)
        case "choice", "acc_norm":
            return Column(key, say("{task}, per character", task=task_title(name)), "share", 1, main=False)
        case "answer_match", "":
            return Column(key, say("{task} answered right", task=task_title(name)), "share", 1)
    return None


def task_title(name: str) -> str:
    """`truthfulqa_mc1` → TruthfulQA mc1, `hellaswag_clean` → HellaSwag clean."""
    known = {"hellaswag": "HellaSwag", "truthfulqa_mc1": "TruthfulQA mc1"}
    base = next((key for key in known if name == key or name.startswith(f"{key}_")), "")
    return known.get(base, "") + name.removeprefix(base).replace("_", " ")


_TASKS = ("bits_per_byte", "answer_loss", "preference_accuracy", "answer_match", "choice")


def _order(key: str, tasks: Mapping[str, str]) -> tuple[int, str]:
    if key in ("parameters", "bytes"):
        return -1, "" if key == "parameters" else "b"
    if "bits_per_byte" in key:
        return 0, key
    name = next((n for n in sorted(tasks, key=len, reverse=True) if key == n or key.startswith(f"{n}_")), "")
    return _TASKS.index(tasks[name]) if tasks.get(name) in _TASKS else len(_TASKS), key


def baseline_name(name: str) -> Both:
    """What a baseline is called, in a table and in a sentence."""
    known = {
        "xz": say("xz -9"),
        "ngram": say("the n-gram model"),
        "untrained": say("the untrained network"),
        "chance": say("guessing"),
        "longer_answer": say("the longer answer"),
        "likelier_to_reference": say("likelier before DPO"),
        "likelier_to_reference_per_token": say("likelier before DPO, per token"),
    }
    return known.get(name, plain(name))


_BASELINES = {"the untrained network": 0, "the n-gram model": 1, "xz -9": 2}


def own_name(code: str) -> str:
    """A language in its own words, for figures that stand in both versions of a page."""
    return {"en": "English", "zh": "中文"}.get(code, code)
