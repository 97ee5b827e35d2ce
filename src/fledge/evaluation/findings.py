"""What the numbers say, in sentences, and what they do not say. A finding never says more than its interval."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from fledge.core.units import show_bytes, show_count
from fledge.evaluation.bilingual import Both, language_name, say
from fledge.evaluation.run_view import RunView
from fledge.evaluation.side_by_side import Cell, Row, SideBySide, baseline_name, task_title

Tone = Literal["good", "bad", "open", "note"]
SMALL = 20e6
"""Parameters below which a model holds the sound of a language and hardly anything of the world."""


@dataclass(frozen=True)
class Finding:
    """One sentence: `good` and `bad` are decided, `open` is not, `note` is a fact."""

    tone: Tone
    text: Both


def verdict(run: RunView, table: SideBySide) -> Finding:
    """The run in one line."""
    unfinished = [stage.name for stage in run.stages if not stage.done]
    if unfinished:
        return Finding("open", say("This run is not finished: {stages}.", stages=", ".join(unfinished)))
    found = list(findings(run, table))
    if not found:
        return Finding("note", say("All stages are finished; nothing was evaluated."))
    good, bad, still = (sum(f.tone == tone for f in found) for tone in ("good", "bad", "open"))
    counts = say(
        "Of {n} comparisons {good} speak for these models, {bad} against, {open} are undecided.",
        n=good + bad + still,
        good=good,
        bad=bad,
        open=still,
    )
    lead = _lead(table)
    tone: Tone = "note" if lead is None else "good" if lead.tone == "good" else "open"
    return Finding(tone, Both(f"{lead.text.en} {counts.en}", f"{lead.text.zh}{counts.zh}") if lead else counts)


def _lead(table: SideBySide) -> Finding | None:
    """The first model against `xz -9` in all languages at once."""
    xz = table.row(baseline_name("xz").en)
    columns = [c for c in table.columns if "bits_per_byte" in c.key and xz is not None and c.key in xz.cells]
    row = next((row for row in table.models if columns and columns[0].key in row.cells), None)
    if row is None or xz is None:
        return None
    pairs = [(c, row.cells[c.key], xz.cells[c.key]) for c in columns if c.key in row.cells]
    numbers = [
        (
            language_name(c.key.rpartition("_")[2]),
            f"{ours.text} < {theirs.text}" if ours.value < theirs.value else f"{ours.text} ≥ {theirs.text}",
        )
        for c, ours, theirs in pairs
    ]
    values = {
        "model": row.name,
        "numbers": Both(
            *("; ".join(f"{getattr(name, lang)} {text}" for name, text in numbers) for lang in ("en", "zh"))
        ),
    }
    if all(ours.value < theirs.value for _, ours, theirs in pairs):
        return Finding("good", say("{model} is below xz -9 in every language ({numbers} bits per byte).", **values))
    return Finding("bad", say("{model} is not below xz -9 in every language ({numbers} bits per byte).", **values))


def findings(run: RunView, table: SideBySide) -> Iterator[Finding]:
    """Everything that can be concluded, in the order of a model's life."""
    yield from _bits_per_byte(table)
    for scores in run.scores():
        for task in scores["tasks"]:
            metrics = {name: row["metrics"] for name, row in scores["models"].items()}
            match task["task"]:
                case "answer_loss":
                    yield from _differences(task, task["key"], list(metrics))
                case "preference_accuracy":
                    yield from _preferences(task, metrics)
                case "choice":
                    yield from _choices(task, metrics)
                case "answer_match":
                    yield from _matches(task, metrics)
    yield from _quantised(run, table)


def _bits_per_byte(table: SideBySide) -> Iterator[Finding]:
    """The first model with a number (the one that was pre-trained) against xz and the n-gram model."""
    for column in table.columns:
        if "bits_per_byte" not in column.key:
            continue
        row = next((row for row in table.models if column.key in row.cells), None)
        if row is None:
            continue
        ours, language = row.cells[column.key], language_name(column.key.rpartition("_")[2])
        for baseline in ("xz", "ngram"):
            other = table.row(baseline_name(baseline).en)
            if other is None or column.key not in other.cells:
                continue
            theirs = other.cells[column.key]
            values = {
                "model": row.name,
                "language": language,
                "ours": ours.text,
                "theirs": theirs.text,
                "baseline": baseline_name(baseline),
            }
            if ours.value < theirs.value:
                yield Finding(
                    "good",
                    say(
                        "{model} compresses {language} better than {baseline}: {ours} bits per byte against {theirs}.",
                        **values,
                    ),
                )
            else:
                yield Finding(
                    "bad",
                    say(
                        "{model} does not compress {language} better than {baseline}: {ours} bits per byte "
                        "against {theirs}.",
                        **values,
                    ),
                )


def _differences(task: Mapping[str, Any], metric: str, names: list[str]) -> Iterator[Finding]:
    """Every model against the one before it, in nats a token."""
    for earlier, later in pairwise(names):
        for row in task["comparisons"]:
            if (row["metric"], row["model"], row["against"]) != (metric, later, earlier):
                continue
            values = {
                "model": later,
                "against": earlier,
                "by": f"{abs(row['value']):.3f}",
                "low": _signed(row["low"], 3),
                "high": _signed(row["high"], 3),
            }
            if max(abs(row["low"]), abs(row["high"])) < 5e-4:
                same = say("{model} and {against} have the same loss on held-out answers, to a thousandth.", **values)
                yield Finding("note", same)
            elif row["high"] < 0:
                yield Finding(
                    "good",
                    say(
                        "{model} lowers the loss on held-out answers against {against} by {by} nats a token "
                        "(difference {low} to {high}).",
                        **values,
                    ),
                )
            elif row["low"] > 0:
                yield Finding(
                    "bad",
                    say(
                        "{model} raises the loss on held-out answers against {against} by {by} nats a token "
                        "(difference {low} to {high}).",
                        **values,
                    ),
                )
            else:
                yield Finding(
                    "open",
                    say(
                        "Whether {model} or {against} has the lower loss on held-out answers is undecided "
                        "(difference {low} to {high}).",
                        **values,
                    ),
                )


def _preferences(task: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Against a coin, and whether the best baseline does as well."""
    key = task["key"]
    rivals = {name: numbers[key] for name, numbers in task["baselines"].items() if key in numbers}
    rival = max(rivals, key=lambda name: rivals[name]["value"], default="")
    for model, numbers in metrics.items():
        if key not in numbers:
            continue
        found = numbers[key]
        values = {"model": model, **_share(found), "n": found["n"]}
        if found["low"] > 0.5:
            yield Finding(
                "good",
                say(
                    "{model} ranks the preferred answer higher in {value} of {n} held-out prompts "
                    "({low}–{high}): more than a coin.",
                    **values,
                ),
            )
        elif found["high"] < 0.5:
            yield Finding(
                "bad",
                say(
                    "{model} ranks the preferred answer higher in only {value} of {n} held-out prompts "
                    "({low}–{high}): less than a coin.",
                    **values,
                ),
            )
        else:
            yield Finding(
                "open",
                say(
                    "Whether {model} ranks held-out answers better than a coin is undecided: {value} of {n} "
                    "({low}–{high}).",
                    **values,
                ),
            )
    near = [m for m, n in metrics.items() if rival and key in n and 0.5 < n[key]["low"] <= rivals[rival]["value"]]
    if near:
        rule, share = baseline_name(rival), _percent(rivals[rival]["value"])
        yield Finding(
            "open",
            say(
                "A simple rule ({baseline}) reaches {rule} on the same prompts; that {models} do better is not shown.",
                baseline=rule,
                rule=share,
                models=", ".join(near),
            ),
        )


def _choices(task: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Against guessing, then every model against the one before it."""
    metric = f"{task['key']}_acc"
    chance = task["baselines"].get("chance", {}).get(metric)
    title = task_title(task["key"])
    if chance is not None:
        above = [m for m, numbers in metrics.items() if metric in numbers and numbers[metric]["low"] > chance]
        open_ = [
            m
            for m, numbers in metrics.items()
            if metric in numbers and numbers[metric]["low"] <= chance <= numbers[metric]["high"]
        ]
        below = [m for m, numbers in metrics.items() if metric in numbers and numbers[metric]["high"] < chance]
        values = {"task": title, "chance": _percent(chance)}
        if above:
            yield Finding(
                "good", say("{task}: {models} better than guessing ({chance}).", models=", ".join(above), **values)
            )
        if open_:
            yield Finding(
                "open",
                say(
                    "{task}: whether {models} do better than guessing ({chance}) is undecided.",
                    models=", ".join(open_),
                    **values,
                ),
            )
        if below:
            yield Finding(
                "bad", say("{task}: {models} worse than guessing ({chance}).", models=", ".join(below), **values)
            )
    yield from _gains(task, metric, title, list(metrics))


def _matches(task: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """How many were right, and every model against the one before it."""
    key, title = task["key"], task_title(task["key"])
    counts = [
        f"{model} {round(numbers[key]['value'] * numbers[key]['n'])}/{numbers[key]['n']}"
        for model, numbers in metrics.items()
        if key in numbers
    ]
    if counts:
        yield Finding("note", say("{task} answered right: {counts}.", task=title, counts=", ".join(counts)))
    yield from _gains(task, key, title, list(metrics))


def _gains(task: Mapping[str, Any], metric: str, title: str, names: list[str]) -> Iterator[Finding]:
    undecided = []
    for earlier, later in pairwise(names):
        for row in task["comparisons"]:
            if (row["metric"], row["model"], row["against"]) != (metric, later, earlier):
                continue
            values = {
                "task": title,
                "model": later,
                "against": earlier,
                "by": _signed(100 * row["value"], 0),
                "low": _signed(100 * row["low"], 0),
                "high": _signed(100 * row["high"], 0),
            }
            if row["low"] > 0:
                yield Finding(
                    "good", say("{task}: {model} is better than {against} by {by} points ({low} to {high}).", **values)
                )
            elif row["high"] < 0:
                yield Finding(
                    "bad", say("{task}: {model} is worse than {against} by {by} points ({low} to {high}).", **values)
                )
            else:
                undecided.append(f"{later} − {earlier} {values['by']} ({values['low']} … {values['high']})")
    if undecided:
        yield Finding(
            "open", say("{task}: undecided differences, in points: {pairs}.", task=title, pairs="; ".join(undecided))
        )


def _quantised(run: RunView, table: SideBySide) -> Iterator[Finding]:
    """What the small form of a model costs and saves: a model of about the same parameters in much less space."""
    names = {stage.name for stage in run.made_by("quantize")}
    rows = [row for row in table.models if "bytes" in row.cells]
    for place, row in enumerate(rows):
        if row.name.en not in names and row.name.en not in _named_after(run, names):
            continue
        source = next((r for r in reversed(rows[:place]) if r.kind == "model"), None)
        if source is None:
            continue
        small, large = row.cells["bytes"].value, source.cells["bytes"].value
        values = {
            "model": row.name,
            "source": source.name,
            "small": show_bytes(small),
            "large": show_bytes(large),
            "times": f"{large / small:.1f}",
        }
        yield Finding(
            "note", say("{model} takes {small} on disk where {source} takes {large}: {times} times less.", **values)
        )


def _named_after(run: RunView, stages: set[str]) -> set[str]:
    """Names that evaluations give to the outputs of these stages."""
    return {
        name
        for stage in run.made_by("evaluate")
        for name, ref in (stage.settings.get("models") or {}).items()
        if str(ref).partition(".")[0] in stages
    }


# --- what it cannot do ---------------------------------------------------------------------------------------------


def limits(run: RunView, table: SideBySide) -> Iterator[Finding]:
    """What a model of this size cannot do, from what was measured."""
    sizes = [row.cells["parameters"].value for row in table.models if row.kind == "model" and "parameters" in row.cells]
    if sizes and max(sizes) < SMALL:
        yield Finding(
            "note",
            say(
                "With {n} parameters these models hold the sound of a language, not the world: phrases may read "
                "well, facts and reasons are missing. Nothing they say is to be believed.",
                n=show_count(max(sizes)),
            ),
        )
    elif sizes:
        yield Finding(
            "note",
            say(
                "With {n} parameters these models follow simple requests; what they state as fact is often "
                "wrong and has to be checked.",
                n=show_count(max(sizes)),
            ),
        )
    for stage in run.made_by("train.pretrain"):
        tokens, parameters = stage.metrics.get("tokens"), max(sizes, default=0)
        if tokens and parameters and tokens < 20 * parameters:
            yield Finding(
                "note",
                say(
                    "{stage} has read {tokens} tokens. By the rule of 20 tokens a parameter (Hoffmann et al., "
                    "2022) this size could use {wanted}: longer training and more text would still help.",
                    stage=stage.name,
                    tokens=show_count(tokens),
                    wanted=show_count(20 * parameters),
                ),
            )
    yield from _repetition(run)
    for _, row, cell in _few_items(table):
        yield Finding(
            "note",
            say(
                "The scores rest on as few as {n} items (95 % interval of {model}: {interval}). Smaller "
                "differences than that cannot be seen here.",
                n=cell.n,
                model=row.name,
                interval=cell.interval,
            ),
        )
        break


def _few_items(table: SideBySide) -> list[tuple[int, Row, Cell]]:
    cells = [
        (cell.n, row, cell)
        for row in table.models
        for column in table.columns
        if (cell := row.cells.get(column.key)) and cell.n and column.unit == "share" and column.main
    ]
    return sorted(cells, key=lambda found: found[0])


def _repetition(run: RunView) -> Iterator[Finding]:
    """How many samples go round in circles, and how many never came to an end."""
    for scores in run.scores():
        for task in scores["tasks"]:
            if task["task"] != "samples":
                continue
            for model, row in scores["models"].items():
                items = run.items(task["key"], model)
                stuck = sum(repeats(item["text"]) for item in items)
                endless = sum(item["ended"] == "length" for item in items if item["chat"])
                chats = sum(item["chat"] for item in items)
                if stuck:
                    yield Finding(
                        "bad",
                        say(
                            "{model} repeats itself without end in {k} of {n} samples.",
                            model=model,
                            k=stuck,
                            n=len(items),
                        ),
                    )
                if row.get("chat", True) and endless:
                    yield Finding(
                        "note",
                        say(
                            "{model} did not come to an end by itself in {k} of {n} answers.",
                            model=model,
                            k=endless,
                            n=chats,
                        ),
                    )


def repeats(text: str) -> bool:
    """Whether a piece that begins with a letter stands three times in a row, a letter six, any sign fifteen times."""
    return re.search(r"([^\W\d].{1,60}?)\1{2,}|([^\W\d])\2{5,}|(\S)\3{14,}", text, re.DOTALL) is not None


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _signed(value: float, digits: int) -> str:
    """With a real minus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _share(number: Mapping[str, Any]) -> dict[str, str]:
    return {
        "value": f"{100 * number['value']:.1f} %",
        "low": f"{100 * number['low']:.0f}",
        "high": f"{100 * number['high']:.0f} %",
    }
