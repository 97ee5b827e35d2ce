"""Looking at what there is: runs, artifacts, data. `python -m fledge.cli.view RUN` writes a run's report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fledge.cli.console import terminal
from fledge.core.artifact import EVENTS, MANIFEST, write_atomic
from fledge.core.db import StageRow
from fledge.core.errors import FledgeError, Problem, did_you_mean
from fledge.core.events import read_events
from fledge.core.language import t
from fledge.core.machine import cores, memory, processor
from fledge.core.store import Store, folder_size, garbage, verify
from fledge.core.units import show_bytes, show_seconds
from fledge.evaluation.run_view import RunView, StageView


def view_of(run: str, store: Store) -> RunView:
    """Everything that is known of a run, from the index and its artifacts."""
    found = {row.name: row for row in store.db.runs()}
    if run not in found:
        raise FledgeError(
            Problem(
                t('there is no run "{name}"', name=run), allowed=", ".join(found) or "—", fix=did_you_mean(run, found)
            )
        )
    stages = store.db.stages(run)
    folder = store.runs / run
    events = [event for row in stages if row.path for event in read_events(Path(row.path) / EVENTS)]
    return RunView(
        name=run,
        recipe_text=(folder / "recipe.yaml").read_text(encoding="utf-8"),
        created=found[run].created,
        machine={"processor": processor(), "cores": cores(), "memory": memory()},
        stages=[_stage_view(row) for row in stages],
        events=events,
        command=f"fledge run {found[run].recipe}",
    )


def _stage_view(row: StageRow) -> StageView:
    manifest = _manifest(row)
    return StageView(
        name=row.name,
        use=row.use,
        status=row.status,
        seconds=manifest.get("seconds", row.seconds),
        fingerprint=row.fingerprint,
        path=row.path,
        inputs=_inputs(row),
        metrics=_metrics(manifest),
        outputs=manifest.get("outputs", {}),
        config=row.facts["description"]["config"],
        estimate=manifest.get("estimate", row.facts["estimate"]),
        peak_memory=manifest.get("peak_memory", 0),
        execution=manifest.get("execution", {}),
        versions=manifest.get("versions", {}),
    )


def _inputs(row: StageRow) -> dict[str, Any]:
    """What stood at every key, and the fingerprint or digest that it had."""
    identities = row.facts["description"]["inputs"]
    return {key: {"stage": text, **identities[key]} for key, text in row.facts["inputs"].items()}


def _manifest(row: StageRow) -> dict[str, Any]:
    file = Path(row.path) / MANIFEST
    return dict(json.loads(file.read_text(encoding="utf-8"))) if row.path and file.exists() else {}


def _metrics(manifest: dict[str, Any]) -> dict[str, Any]:
    """A single output's metrics as they are, those of several by part."""
    outputs = manifest.get("outputs", {})
    if set(outputs) == {""}:
        return dict(outputs[""]["metrics"])
    return {part: output["metrics"] for part, output in outputs.items()}


def show_run(run: str, as_json: bool, check: bool) -> None:
    """`fledge show`."""
    store = Store()
    view = view_of(run, store)
    problems = [p for stage in view.stages if stage.path and check for p in verify(Path(stage.path))]
    if as_json:
        keys = ("name", "use", "status", "seconds", "fingerprint", "path", "inputs", "metrics")
        stages = [{key: getattr(stage, key) for key in keys} for stage in view.stages]
        click.echo(json.dumps({"name": view.name, "stages": stages}, ensure_ascii=False, indent=1, default=str))
    else:
        _print_stages(view, terminal())
    if problems:
        raise FledgeError(*problems)
    if check:
        click.echo(t("every file is as it was made"), err=as_json)


def _print_stages(view: RunView, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in (t("stage"), t("what"), t("status"), t("time"), t("memory"), t("measured"), t("path")):
        table.add_column(title, overflow="fold")
    for stage in view.stages:
        size = show_bytes(stage.peak_memory) if stage.peak_memory else ""
        table.add_row(
            stage.name,
            stage.use,
            t(stage.status),
            show_seconds(stage.seconds),
            size,
            _headline(stage.metrics),
            stage.path,
        )
    console.print(table)


def _headline(metrics: dict[str, Any], limit: int = 6) -> str:
    """The first few numbers of a stage, a line each."""
    flat: list[str] = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            flat += [f"{key}.{k} {_number(v)}" for k, v in value.items() if isinstance(v, (int, float))]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat.append(f"{key} {_number(value)}")
    return "\n".join(flat[:limit] + (["…"] if len(flat) > limit else []))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def print_summary(run: str, store: Store, console: Console) -> None:
    """The end of `fledge run`: every model side by side, where the report is, how to go on."""
    from fledge.evaluation.console import models_table

    view = view_of(run, store)
    table = models_table(view)
    if table is not None:
        console.print(table)
    report = store.runs / run / "report.html"
    if report.exists():
        console.print(t("report: {path}", path=report))
    models = [s for s in view.stages if any(o["kind"] in ("model", "adapter") for o in s.outputs.values())]
    if models:
        console.print(t("model:  {path}", path=models[-1].path))
        console.print(t("talk to it: fledge chat {run}   in a browser: fledge serve {run}", run=run))


def print_forecasts(run: str, made: Collection[str], store: Store, console: Console) -> None:
    """Of every training that was made: the memory and the time that it took, and what was predicted; a line each."""
    for row in store.db.stages(run):
        if row.name in made:
            for line in forecasts(_stage_view(row)):
                console.print(line, style="dim")


def forecasts(stage: StageView) -> list[str]:
    """`base: 1.61 GB of memory (predicted: 1.68 GB), 12 min of training (predicted: 11 min)`, for every training of a
    stage. One that was over before its pace was known has no prediction of its time."""
    told: dict[tuple[float | None, ...], str] = {}  # a training that made two models is told once
    several = len({output.get("metrics", {}).get(FORECAST[0]) for output in stage.outputs.values()}) > 1
    for part, output in stage.outputs.items():
        size, expected, took, awaited = found = tuple(output.get("metrics", {}).get(key) for key in FORECAST)
        if size is None or expected is None or found in told:
            continue
        name = f"{stage.name}.{part}" if several else stage.name
        line = t("{stage}: {measured} of memory (predicted: {predicted})",
                 stage=name, measured=show_bytes(size), predicted=show_bytes(expected))  # fmt: skip
        if took is not None and awaited is not None:
            line += t(", {measured} of training (predicted: {predicted})",
                      measured=show_seconds(took), predicted=show_seconds(awaited))  # fmt: skip
        told[found] = line
    return list(told.values())


FORECAST = ("measured_memory", "predicted_memory", "measured_seconds", "predicted_seconds")


def list_runs(as_json: bool) -> None:
    """`fledge runs`."""
    store = Store()
    rows = store.db.runs()
    if as_json:
        click.echo(json.dumps([vars(row) for row in rows], ensure_ascii=False, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in (t("run"), t("status"), t("begun"), t("stages"), t("recipe")):
        table.add_column(title)
    for row in rows:
        stages = store.db.stages(row.name)
        made = sum(stage.status in ("made", "cached") for stage in stages)
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.created))
        table.add_row(row.name, t(row.status), begun, f"{made}/{len(stages)}", row.recipe)
    terminal().print(table if rows else t("there is no run yet; begin with: fledge run"))


def collect_garbage(dry_run: bool) -> None:
    """`fledge gc`."""
    store = Store()
    unused = garbage(store)
    total = sum(folder_size(folder) for folder in unused)
    for folder in unused:
        click.echo(f"{folder.name}  {show_bytes(folder_size(folder))}")
        if not dry_run:
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
    key = "{count} folders, {size}, would be deleted" if dry_run else "{count} folders, {size}, deleted"
    click.echo(t(key, count=len(unused), size=show_bytes(total)))


def inspect_data(
    path: str, tokenizer: str, html: str, as_json: bool, spot_check: int | None, table: str, judged: str, seed: int
) -> None:
    """`fledge data inspect`."""
    from fledge.data.inspection.inspect import inspect
    from fledge.data.inspection.spot_check import Verdicts, write_table

    verdicts = Verdicts.read(Path(judged)) if judged else None
    folder = _lies_at(path)
    report = inspect(folder, tokenizer=_lies_at(tokenizer) if tokenizer else None, shown=spot_check or 12, seed=seed)
    if spot_check:
        rows = write_table(report.spot, Path(table))
        click.echo(t("{rows} rows to judge: {path}", rows=rows, path=table), err=True)
    if html:
        from fledge.data.inspection.inspect_page import page

        write_atomic(Path(html), page(report, verdicts))
        click.echo(html)
    if as_json:
        found = report.to_json() | ({"judged": verdicts.to_json()} if verdicts else {})
        click.echo(json.dumps(found, ensure_ascii=False, indent=1))
    elif not html:
        click.echo(report.to_text())
    if verdicts and not as_json:
        click.echo(verdicts.to_text())


def sample_data(path: str, rows: int, seed: int, by: Any, to: str, out: str) -> None:
    """`fledge data sample`."""
    from fledge.data.inspection.sample import FORMAT_OF_KIND, sample_of
    from fledge.records.writers import known, spelled, write_format

    if to:
        known(to)
    kind, records = sample_of(_lies_at(path), rows, seed, by or "")
    form = to or FORMAT_OF_KIND[kind]
    if out:
        write_format(records, form, Path(out))
        click.echo(out)
        return
    for record in records:
        row = spelled(record, form)
        if row is None:
            raise FledgeError(t('the record {id} cannot be written as "{name}"', id=record.id, name=form))
        click.echo(json.dumps(row, ensure_ascii=False))


def _lies_at(path: str) -> Path:
    """A file or folder, or what RUN/STAGE made."""
    run, slash, stage = path.partition("/")
    if slash and not Path(path).exists():
        name, _, part = stage.partition(".")
        for row in Store().db.stages(run):
            if row.name == name and row.path:
                return Path(row.path) / part
    return Path(path)


def write_report_of(run: str) -> None:
    """Write `report.html` beside the run's events."""
    from fledge.evaluation.report import write_report

    store = Store()
    target = store.runs / run / "report.html"
    draft = target.with_suffix(".draft.html")
    write_report(view_of(run, store), draft)
    write_atomic(target, draft.read_text(encoding="utf-8"))
    draft.unlink()


if __name__ == "__main__":
    write_report_of(sys.argv[1])
