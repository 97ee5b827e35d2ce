"""The report of a run: one HTML file that needs nothing else, in English and Chinese, on paper and on a telephone.

    write_report(run, Path("report.html"))

It shows what is there: a run that is not finished, or evaluates nothing, still gets its curves, its data and its
lineage. Whatever a model or a data set wrote is escaped, and a content security policy forbids the page to load or
run anything but its own few lines of script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fledge.core.language import language
from fledge.core.units import show_bytes, show_seconds
from fledge.evaluation import figures
from fledge.evaluation.bilingual import Both, language_name, say
from fledge.evaluation.data_view import data_cards, facts_of, humanise
from fledge.evaluation.findings import findings, limits, verdict
from fledge.evaluation.run_view import RunView, StageView
from fledge.evaluation.side_by_side import SideBySide, own_name, side_by_side

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: RunView, file: Path) -> None:
    """Write the report of `run` to `file`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    table = side_by_side(run)
    page = environment.get_template("report.html.jinja").render(
        say=say,
        tidy=tidy,
        bytes=show_bytes,
        seconds=show_seconds,
        lang="zh-CN" if language() == "zh" else "en",
        script=Markup(script),
        script_digest=digest,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        run=run,
        created=time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created)) if run.created else "",
        command=run.command or f"fledge run recipes/{run.name}.yaml",
        table=table,
        verdict=verdict(run, table),
        facts=_facts(run, table),
        comparison=list(_comparison(table)),
        findings=list(findings(run, table)),
        limits=list(limits(run, table)),
        samples=list(_samples(run)),
        training=list(_training(run)),
        data=list(data_cards(run)),
        costs=_costs(run),
        lineage=[_lineage(stage) for stage in run.stages],
        versions=_versions(run),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class Figure:
    """A plot with its title, its legend (colour, name) and a line that explains it."""

    title: Both
    svg: Markup
    legend: Sequence[tuple[str, Both]] = ()
    note: Both | None = None


def _facts(run: RunView, table: SideBySide) -> list[tuple[Both, str, Both | str]]:
    """The few numbers at the top: (name, number, remark)."""
    made = [stage for stage in run.stages if stage.done]
    facts: list[tuple[Both, str, Both | str]] = []
    if made:
        facts.append(
            (
                say("time of all stages"),
                show_seconds(sum(stage.seconds for stage in made)),
                say("{n} stages", n=len(made)),
            )
        )
        facts.append(
            (
                say("most memory"),
                show_bytes(max(stage.peak_memory for stage in made)),
                max(made, key=lambda s: s.peak_memory).name,
            )
        )
    first = next((row for row in table.models if row.kind == "model" and "parameters" in row.cells), None)
    if first:
        size = first.cells["bytes"].text if "bytes" in first.cells else ""
        facts.append((say("parameters"), first.cells["parameters"].text, size))
    for column in table.columns:
        row = next((row for row in table.models if column.key in row.cells), None)
        if "bits_per_byte" in column.key and row is not None:
            xz = next(
                (r.cells[column.key].text for r in table.baselines if r.name.en == "xz -9" and column.key in r.cells),
                None,
            )
            facts.append(
                (column.title, row.cells[column.key].text, say("xz -9: {value}", value=xz) if xz else row.name)
            )
    return facts


def _comparison(table: SideBySide) -> Iterator[Figure]:
    """Bits per byte as bars; every proportion as points with intervals."""
    columns = [column for column in table.columns if "bits_per_byte" in column.key]
    if columns:
        rows = [row for row in table.rows if any(column.key in row.cells for column in columns)]
        models = [row for row in rows if row.kind != "baseline"]
        colours = [figures.series_colour(i) for i in range(len(models))]
        colours += [figures.series_colour(i, baseline=True) for i in range(len(rows) - len(models))]
        series = {
            colour: [c.value if (c := row.cells.get(column.key)) else None for column in columns]
            for colour, row in zip(colours, rows, strict=True)
        }
        groups = [own_name(column.key.rpartition("_")[2]) for column in columns]
        legend = [(colour, row.name) for colour, row in zip(colours, rows, strict=True)]
        note = say("Bits that one byte of held-out text takes; less is better, whatever the tokenizer.")
        yield Figure(say("Bits per byte"), figures.grouped_bars("bits", groups, series), legend, note)
    for column in table.columns:
        models = [row for row in table.models if (c := row.cells.get(column.key)) and c.low is not None]
        if column.unit != "share" or not column.main or not models:
            continue
        baseline = max(
            (row.cells[column.key].value for row in table.baselines if column.key in row.cells), default=None
        )
        if baseline is None and "preference" in column.key:
            baseline = 0.5
        points = [
            (
                row.name.en,
                100 * row.cells[column.key].value,
                100 * (row.cells[column.key].low or 0),
                100 * (row.cells[column.key].high or 0),
            )
            for row in models
        ]
        note = (
            say(
                "Per cent, with 95 % intervals. Dashed: the best baseline. An interval that reaches the line "
                "decides nothing."
            )
            if baseline is not None
            else say("Per cent, with 95 % intervals.")
        )
        svg = figures.intervals(f"share-{_slug(column.key)}", points, None if baseline is None else 100 * baseline)
        yield Figure(column.title, svg, (), note)


# --- training ------------------------------------------------------------------------------------------------------

_SHOWN_CURVES = (
    "loss",
    "loss_by_source",
    "held_out_loss",
    "bits_per_byte",
    "accuracy",
    "reward",
    "margin",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "mfu",
    "data_wait",
    "memory",
    "loss_scale",
)
_LAYERED = (
    "grad_norm", "update_ratio", "activation_rms", "activation_mean", "activation_max", "attention_entropy",
    "attention_logit_max", "zeros", "dead", "grad_zeros", "near_limit",
)  # fmt: skip
_SHORT = {"embeddings": "E", "rest": "R"}  # in a figure stand no words


@dataclass(frozen=True)
class Training:
    """What is shown of a training stage: its curves and its numbers."""

    stage: StageView
    figures: Sequence[Figure]
    facts: Sequence[tuple[Both, Both]]


def _training(run: RunView) -> Iterator[Training]:
    """Every stage that trains, in order."""
    points: dict[str, dict[str, dict[int, float]]] = {}
    for event in run.events:
        if event.kind == "metric" and event.step is not None and isinstance(event.value, (int, float)):
            points.setdefault(event.stage, {}).setdefault(event.name, {})[event.step] = float(event.value)
    for stage in run.stages:
        curves = {name: dict(sorted(p.items())) for name, p in points.get(stage.name, {}).items() if len(p) > 1}
        if curves or (stage.done and stage.use.startswith(("train.", "search."))):
            shown = [*_rate_range(stage), *_scaling(stage), *_figures(stage, curves)]
            yield Training(stage, shown, list(facts_of(_own_numbers(stage))))


def _rate_range(stage: StageView) -> Iterator[Figure]:
    """The loss over the rate, of a stage that looked for one."""
    folder = stage.folder()
    if stage.done and stage.use == "search.rate_range" and folder and (folder / "study.json").is_file():
        study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        svg = figures.over_rates(f"{_slug(stage.name)}-rates", study["points"], study["suggested_lr"])
        note = say("over the learning rate; to begin with: {rate}", rate=f"{study['suggested_lr']:.2g}")
        yield Figure(say("Loss over the learning rate"), svg, (), note)


def _scaling(stage: StageView) -> Iterator[Figure]:
    """The law of a scaling study, and the larger run that it was checked on."""
    folder = stage.folder()
    if stage.done and stage.use == "search.scaling" and folder and (folder / "study.json").is_file():
        study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        note = say("over the operations 6·N·D")
        if "check" in study:
            note = say(
                "over the operations 6·N·D; the larger run: {measured}, predicted {low} to {high}",
                measured=f"{study['measured_loss']:.3f}", low=f"{study['predicted_low']:.3f}",
                high=f"{study['predicted_high']:.3f}",
            )  # fmt: skip
        yield Figure(say("Scaling law"), figures.law(f"{_slug(stage.name)}-law", study), (), note)


def _own_numbers(stage: StageView) -> dict[str, Any]:
    """What the table of the models does not show already."""
    numbers = {key: value for key, value in stage.metrics.items() if "bits_per_byte" not in key}
    return numbers | ({"mfu": 100 * numbers["mfu"]} if "mfu" in numbers else {})


def _figures(stage: StageView, curves: Mapping[str, Mapping[int, float]]) -> list[Figure]:
    """The curves in a fixed order; several languages of one measure share a figure."""
    groups: dict[str, dict[str, Mapping[int, float]]] = {}
    for name, points in curves.items():
        if name == "loss" or points != curves.get("loss"):  # the objective's only term is its loss
            base, member = _family(name)
            groups.setdefault(base, {})[member] = points
    if groups.get("loss_by_source"):
        groups["loss_by_source"] = dict(sorted(groups["loss_by_source"].items()))
    layered = [name for name in _LAYERED if f"{name}/" in groups]
    maps = [_layers(stage, name, groups.pop(f"{name}/")) for name in layered]
    order = sorted(groups, key=lambda name: (_SHOWN_CURVES.index(name) if name in _SHOWN_CURVES else 3.5, name))
    return [*(_curve(stage, name, groups[name]) for name in order), *filter(None, maps)]


def _family(name: str) -> tuple[str, str]:
    """(figure, series): `bits_per_byte_zh` → bits_per_byte, zh; `chosen_reward` → reward, chosen."""
    if name.startswith("loss/"):
        return "loss_by_source", name.removeprefix("loss/")
    base, _, layer = name.partition("/")
    if layer and base in _LAYERED:
        return f"{base}/", layer
    if name in ("memory", "memory_peak"):
        return "memory", "now" if name == "memory" else "most"
    if match := re.fullmatch(r"(.*)[_/](en|zh)", name):
        return match[1], match[2]
    if match := re.fullmatch(r"(chosen|rejected)_(\w+)", name):
        return match[2], match[1]
    return name, ""


def _curve(stage: StageView, name: str, series: Mapping[str, Mapping[int, float]]) -> Figure:
    titles = {
        "loss": say("Loss"),
        "held_out_loss": say("Loss, held out"),
        "bits_per_byte": say("Bits per byte, held out"),
        "accuracy": say("Accuracy"),
        "reward": say("Implicit reward"),
        "grad_norm": say("Gradient norm"),
        "lr": say("Learning rate"),
        "tokens_per_second": say("Tokens a second"),
        "loss_by_source": say("Loss by source"),
        "mfu": say("Model FLOPs utilisation"),
        "data_wait": say("Time spent waiting for batches"),
        "memory": say("Memory"),
        "checkpoint_seconds": say("Seconds that writing a checkpoint took"),
        "loss_scale": say("Loss scale of fp16"),
    }
    members = {
        "chosen": say("preferred answers"), "rejected": say("other answers"), "now": say("in use"), "most": say("peak"),
    }  # fmt: skip
    legend = [(figures.series_colour(i), members.get(key) or language_name(key)) for i, key in enumerate(series) if key]
    exact = name in ("lr", "tokens_per_second", "mfu", "data_wait", "memory")
    svg = figures.curves(
        f"{_slug(stage.name)}-{_slug(name)}",
        series,
        log=name in ("grad_norm", "loss_scale"),
        smooth=not exact,
        zero=exact,
    )
    notes = {
        "mfu": say("the share of the machine's matrix rate that the model's own arithmetic uses, over steps"),
        "data_wait": say("as a share of the time, over steps"),
        "memory": say("in bytes, over steps"),
    }
    return Figure(titles.get(name, humanise(name)), svg, legend, notes.get(name, say("over steps")))


def _layers(stage: StageView, name: str, series: Mapping[str, Mapping[int, float]]) -> Figure | None:
    """Layers over steps, a field each; nothing where all of it is zero."""
    titles = {
        "grad_norm": say("Gradient norm by layer"),
        "update_ratio": say("Update by layer, as a share of the weights"),
        "activation_rms": say("Activations by layer, root of the mean square"),
        "activation_mean": say("Activations by layer, mean"),
        "activation_max": say("Activations by layer, largest"),
        "attention_entropy": say("Entropy of the attention by layer"),
        "attention_logit_max": say("Largest attention logit by layer"),
        "zeros": say("Zeros behind the activation function by layer"),
        "dead": say("Units that are zero for every token, by layer"),
        "grad_zeros": say("Zeros among the gradients by layer"),
        "near_limit": say("Activations near the limit of fp16 by layer"),
    }
    order = sorted(series, key=lambda layer: (layer != "embeddings", layer == "rest", layer))
    rows = {_SHORT.get(layer, layer): series[layer] for layer in order}
    shares = name in ("zeros", "dead", "grad_zeros", "near_limit")  # of interest where they are more than a few
    if max((abs(value) for points in rows.values() for value in points.values()), default=0.0) <= 0.01 * shares:
        return None
    svg, low, high = figures.heat(
        f"{_slug(stage.name)}-{_slug(name)}-layers", rows, log=name in ("grad_norm", "update_ratio")
    )
    note = say(
        "layers from first to last over steps; faint is {low}, strong is {high}", low=f"{low:.3g}", high=f"{high:.3g}"
    )
    if "E" in rows or "R" in rows:
        note = say("{note}; E: embeddings, R: the rest", note=note)
    return Figure(titles[name], svg, (), note)


# --- samples, cost, lineage ----------------------------------------------------------------------------------------


def _samples(run: RunView) -> Iterator[dict[str, Any]]:
    """For every prompt what each model wrote: {"prompt", "answers": [(model, text, chat, ended)]}."""
    for scores in run.scores():
        for task in scores["tasks"]:
            if task["task"] != "samples":
                continue
            by_model = {
                name: run.items(task["key"], name) for name, row in scores["models"].items() if row["kind"] == "model"
            }
            prompts = dict.fromkeys(item["prompt"] for items in by_model.values() for item in items)
            for prompt in prompts:
                answers = [
                    (name, item) for name, items in by_model.items() for item in items if item["prompt"] == prompt
                ]
                yield {"prompt": prompt, "answers": answers}


def _costs(run: RunView) -> dict[str, Any]:
    """Predicted against measured, a row a stage."""
    rows: list[dict[str, Any]] = []
    for stage in run.stages:
        if stage.done:
            seconds, memory = stage.estimate.get("seconds"), stage.estimate.get("memory")
            rows.append(
                {
                    "stage": stage,
                    "seconds": seconds, "seconds_held": _held(stage.seconds, seconds),
                    "memory": memory, "memory_held": _held(stage.peak_memory, memory),
                    "share": stage.seconds,
                }
            )  # fmt: skip
    total = sum(row["stage"].seconds for row in rows) or 1.0
    for row in rows:
        row["share"] = 100 * row["stage"].seconds / total
    judged = [row for row in rows if row["seconds"]]
    return {"rows": rows, "held": sum(row["seconds_held"] for row in judged), "judged": len(judged)}


def _held(measured: float, predicted: Sequence[float] | None) -> bool:
    return bool(predicted) and predicted is not None and predicted[0] <= measured <= predicted[1]


def _lineage(stage: StageView) -> dict[str, Any]:
    """What a stage was made of and with which settings."""
    settings = dict(stage.settings)
    return {
        "stage": stage,
        "inputs": list(dict.fromkeys(map(_input, stage.inputs.values()))),
        "config": json.dumps(settings, ensure_ascii=False, indent=1) if settings else "",
        "execution": ", ".join(f"{key} {value}" for key, value in stage.execution.items()),
        "kinds": ", ".join(
            f"{name}: {_kind(entry)}" if name else _kind(entry) for name, entry in stage.outputs.items()
        ),
    }


def _kind(entry: Any) -> str:
    return str(entry.get("kind", "")) if isinstance(entry, Mapping) else str(entry)


def _input(value: Any) -> str:
    if isinstance(value, Mapping):
        digest = str(value.get("fingerprint") or value.get("digest") or "")[:12]
        return " ".join(filter(None, (str(value.get("stage", "")), digest)))
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _versions(run: RunView) -> list[tuple[str, str]]:
    """Name and version of what made the artifacts; several versions where stages differ."""
    found: dict[str, list[str]] = {}
    for stage in run.stages:
        for name, version in stage.versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return [(name, ", ".join(versions)) for name, versions in found.items()]


def tidy(text: str) -> str:
    """A sample without the empty lines that would push the next one off the page."""
    return re.sub(r"\n\s*\n\s*", "\n\n", text.strip("\n"))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text) or "x"
