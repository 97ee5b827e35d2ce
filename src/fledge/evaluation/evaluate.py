"""The examination itself: models are loaded one after another, each once, and asked everything.

Every answer is written to `work/items` before the next question is put, so that a killed evaluation goes on at the
first answer it does not have. The numbers are drawn at the end, from the items alone.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fledge.core.artifact import write_atomic
from fledge.core.events import Emitter
from fledge.core.intervals import Interval, mcnemar, paired_proportions, ratio_interval
from fledge.core.job import Job
from fledge.core.language import t
from fledge.evaluation.subject import Named, Subject, weights_of
from fledge.evaluation.tasks.base import Conclusion, Item, Number, Paired, Task

Open = Callable[[Named], Subject]


@dataclass
class Candidate:
    """A model and the tasks that it has to answer."""

    named: Named
    tasks: list[Task] = field(default_factory=list)


def candidates(
    models: Mapping[str, Path | str], tasks: Sequence[Task], job: Job, completes: Sequence[str]
) -> tuple[list[Candidate], dict[str, dict[str, str]]]:
    """Whom to ask what, and for every task which name plays which part (a reference is often one of the models)."""
    found = {
        name: Candidate(Named(name, path, chat=name not in completes), list(tasks)) for name, path in models.items()
    }
    roles: dict[str, dict[str, str]] = {}
    for task in tasks:
        for role, ref in task.wants().items():
            path, reward = job.open(ref).path, role == "reward"
            known = next((c for c in found.values() if c.named.path == path and c.named.reward == reward), None)
            if known is None:
                name = _free(ref.text if ref.looks_like_output else role, found)
                known = found[name] = Candidate(Named(name, path, reward=reward, shown=reward))
            if task not in known.tasks:
                known.tasks.append(task)
            roles.setdefault(task.key, {})[role] = known.named.name
    return list(found.values()), roles


def _free(name: str, taken: Mapping[str, object]) -> str:
    name = name.partition(".")[0]
    return name if name not in taken else _free(f"{name}_", taken)


def evaluate(
    models: Mapping[str, Path | str],
    tasks: Sequence[Task],
    job: Job,
    open_subject: Open,
    completes: Sequence[str] = (),
    weigh: Callable[[Path], tuple[int, int]] = weights_of,
    contaminated: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Any]:
    """Ask all, conclude, and return what `scores.json` says. Items lie in `job.out/items/<task>/<model>.jsonl`.

    `models`: the folder of each, or the address of the server that answers for it.

    `contaminated` (task → ids of items that stand in training data) gives each such task's numbers a second time,
    apart: as `<task>_clean` and `<task>_contaminated`.
    """
    people, roles = candidates(models, tasks, job, completes)
    rows = {task.key: task.load(job) for task in tasks}
    progress = _Progress(job.events, sum(task.count(rows[task.key]) for who in people for task in who.tasks))
    for who in people:
        _examine(who, rows, job, open_subject, progress)
    concluded: list[tuple[Task, Conclusion]] = []
    for task in tasks:
        answers = _answers(task, people, job)
        parts = [(task, rows[task.key], answers)]
        if contaminated is not None:
            parts += _apart(task, rows[task.key], answers, contaminated, job)
        for part, asked, answered in parts:
            seed = job.rng_seed("bootstrap", part.key)
            concluded.append((part, part.conclude(asked, answered, roles.get(task.key, {}), seed)))
    conclusions = {task.key: conclusion for task, conclusion in concluded}
    return {
        "models": {who.named.name: _row(who, conclusions, weigh) for who in people if who.named.shown},
        "tasks": [_task(task, conclusion, job) for task, conclusion in concluded],
    }


def _examine(who: Candidate, rows: Mapping[str, Any], job: Job, open_subject: Open, progress: _Progress) -> None:
    """Put all tasks to one model; load it only when an answer is missing."""
    subject: Subject | None = None
    try:
        for task in who.tasks:
            file = _items_file(job.work, task, who)
            if file.exists():
                progress(task.count(rows[task.key]), who, task)
                continue
            if subject is None:
                job.events.message(t("{model}: loading", model=who.named.name))
                subject = open_subject(who.named)
            tell = partial(progress, who=who, task=task)
            items = task.ask(rows[task.key], subject, job.rng_seed("ask", task.key), tell)
            write_atomic(file, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    finally:
        if subject is not None:
            subject.engine.close()
            del subject
            gc.collect()  # a model holds cycles: its memory must be free before the next one is loaded


def _answers(task: Task, people: Sequence[Candidate], job: Job) -> dict[str, list[Item]]:
    """What every model answered; the items are written beside the scores."""
    answers: dict[str, list[Item]] = {}
    for who in people:
        if task in who.tasks:
            text = _items_file(job.work, task, who).read_text(encoding="utf-8")
            write_atomic(_items_file(job.out, task, who), text)
            answers[who.named.name] = [json.loads(line) for line in text.split("\n") if line]
    return answers


def _apart(
    task: Task, rows: Any, answers: Mapping[str, list[Item]], contaminated: Mapping[str, Collection[str]], job: Job
) -> Iterator[tuple[Task, Any, dict[str, list[Item]]]]:
    """The task on the items that training cannot have seen, and on those that it may have; a part without items is
    left out. Every number's interval says on how many items it stands."""
    names = (task.key, getattr(task, "name", ""), getattr(getattr(task, "data", None), "text", ""))
    known = [contaminated[name] for name in names if name in contaminated]
    items = next(iter(answers.values()), [])
    if not known or not isinstance(rows, list) or len(items) != len(rows) or any("id" not in item for item in items):
        job.events.message(t("{task}: the report on contamination does not know these items", task=task.key))
        return
    dirty = [any(item["id"] in ids for ids in known) for item in items]
    for name, wanted in (("clean", False), ("contaminated", True)):
        at = [i for i, is_dirty in enumerate(dirty) if is_dirty == wanted]
        if at:
            part = task.model_copy(update={"label": f"{task.key}_{name}"})
            yield part, [rows[i] for i in at], {who: [some[i] for i in at] for who, some in answers.items()}


def _items_file(folder: Path, task: Task, who: Candidate) -> Path:
    return folder / "items" / task.key / f"{who.named.name}.jsonl"


class _Progress:
    """Counts rows over all models and tasks."""

    def __init__(self, events: Emitter, total: int) -> None:
        self.events, self.total, self.done = events, total, 0

    def __call__(self, more: int, who: Candidate, task: Task) -> None:
        self.done += more
        self.events.progress(self.done, self.total, "items", model=who.named.name, task=task.key)


# --- scores.json ---------------------------------------------------------------------------------------------------


def _row(
    who: Candidate, conclusions: Mapping[str, Conclusion], weigh: Callable[[Path], tuple[int, int]]
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for conclusion in conclusions.values():
        metrics |= _json(conclusion.models.get(who.named.name, {}))
    kind = "reward-model" if who.named.reward else "model"
    row = {"kind": kind, "chat": who.named.chat, "metrics": metrics}
    if isinstance(who.named.path, str):
        return {**row, "address": who.named.path}
    parameters, size = weigh(who.named.path)
    return {**row, "parameters": parameters, "bytes": size}


def _task(task: Task, conclusion: Conclusion, job: Job) -> dict[str, Any]:
    seed = job.rng_seed("compare", task.key)
    technique = getattr(task, "technique", None)
    return {
        "key": task.key,
        "task": task.task,  # type: ignore[attr-defined]
        **({} if technique is None else {"technique": technique.model_dump(mode="json", exclude_none=True)}),
        "baselines": {name: _json(numbers) for name, numbers in conclusion.baselines.items()},
        "comparisons": [row for paired in conclusion.paired for row in compare(paired, seed)],
    }


def compare(paired: Paired, seed: int) -> list[dict[str, Any]]:
    """Every model against every earlier one on the same items: the difference, its interval, McNemar's p-value."""
    names, rows = list(paired.values), []
    for j, b in enumerate(names):
        for a in names[:j]:
            difference = _difference(paired, b, a, seed)
            if difference is not None:
                rows.append({"metric": paired.metric, "model": b, "against": a, **difference})
    return rows


def _difference(paired: Paired, model: str, against: str, seed: int) -> dict[str, Any] | None:
    a, b = paired.values[model], paired.values[against]
    if len(a) != len(b) or len(a) < 2:
        return None
    if paired.proportion:
        gain = sum(max(x - y, 0) for x, y in zip(a, b, strict=True))
        loss = sum(max(y - x, 0) for x, y in zip(a, b, strict=True))
        return {**paired_proportions(gain, loss, len(a)).to_json(), "p": mcnemar(int(gain), int(loss))}
    weights = paired.weights.get(model)
    if weights is None or weights != paired.weights.get(against):  # other tokenizers: other units
        return None
    return ratio_interval([x - y for x, y in zip(a, b, strict=True)], weights, seed).to_json()


def _json(numbers: Mapping[str, Number]) -> dict[str, Any]:
    return {key: value.to_json() if isinstance(value, Interval) else value for key, value in numbers.items()}


def flatten(scores: Mapping[str, Any]) -> dict[str, Any]:
    """`base.answer_loss: 3.1`, `base.answer_loss_interval: [3.0, 3.2]`, `baselines.xz.bits_per_byte_en: 2.9`."""
    flat: dict[str, Any] = {}
    for name, row in scores["models"].items():
        flat |= {f"{name}.{key}": row[key] for key in ("parameters", "bytes") if key in row}
        flat |= _flat(name, row["metrics"])
    for task in scores["tasks"]:
        for name, numbers in task["baselines"].items():
            flat |= _flat(f"baselines.{name}", numbers)
    return flat


def _flat(prefix: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in numbers.items():
        if isinstance(value, Mapping):
            flat[f"{prefix}.{key}"] = value["value"]
            flat[f"{prefix}.{key}_interval"] = [value["low"], value["high"]]
        else:
            flat[f"{prefix}.{key}"] = value
    return flat
