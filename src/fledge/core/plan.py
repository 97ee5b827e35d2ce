"""What a run would do, and why. A fingerprint says all that a payload depends on; what is there is not made again.

Fingerprint = the stage's config, its inputs' fingerprints, digests of what comes from outside, its version, the seed.
Device, processes, threads and micro-batch (`Execution`) are recorded but not part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fledge.core.artifact import MANIFEST, digest_of
from fledge.core.db import StageRow
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.machine import Machine, this_machine
from fledge.core.recipe import Node, Recipe
from fledge.core.reference import Outside
from fledge.core.stage import Estimate, Size
from fledge.core.store import Store

Status = Literal["cached", "resume", "make"]


@dataclass(frozen=True)
class Step:
    """One stage of a plan. `why` says in sentences why it is not simply there."""

    node: Node
    fingerprint: str
    description: dict[str, Any]
    status: Status
    why: tuple[str, ...]
    estimate: Estimate

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def use(self) -> str:
        return self.node.stage.use


@dataclass(frozen=True)
class Plan:
    """The steps of a recipe in the order in which they run."""

    recipe: Recipe
    steps: tuple[Step, ...]

    @property
    def to_make(self) -> tuple[Step, ...]:
        """The steps that are not there yet."""
        return tuple(step for step in self.steps if step.status != "cached")

    def total(self) -> Estimate:
        """Seconds and disk of all that has to be made; memory of the hungriest stage."""
        made = [step.estimate for step in self.to_make]
        return Estimate(
            seconds=(sum(e.seconds[0] for e in made), sum(e.seconds[1] for e in made)),
            memory=(max((e.memory[0] for e in made), default=0), max((e.memory[1] for e in made), default=0)),
            disk=sum(e.disk for e in made),
        )

    def refuse_what_cannot_fit(self) -> None:
        """Raise a FledgeError for every stage that would not fit into memory, before anything starts."""
        found = [
            replace(problem, where=f"{self.recipe.file} (stages.{step.name})", fix=_or_insist(problem))
            for step in self.to_make
            if (problem := step.estimate.too_large)
        ]
        if found:
            raise FledgeError(*found)

    def to_dict(self) -> dict[str, Any]:
        """For `fledge plan --json`."""
        return {
            "name": self.recipe.name,
            "stages": [
                {
                    "name": s.name, "use": s.use, "status": s.status, "why": list(s.why), "fingerprint": s.fingerprint,
                    "seconds": list(s.estimate.seconds), "memory": list(s.estimate.memory), "disk": s.estimate.disk,
                    "notes": list(s.estimate.notes), "memory_parts": dict(s.estimate.parts),
                    "flops": s.estimate.flops, "available_memory": s.estimate.available,
                    "fits": None if not s.estimate.parts else s.estimate.too_large is None,
                }
                for s in self.steps
            ],
        }  # fmt: skip


def _or_insist(problem: Problem) -> str:
    return f"{problem.fix}; " + t("to start it all the same: --memory-check off")


@dataclass
class _Known:
    """What is known so far while a plan is drawn up: fingerprints, and sizes by reference text."""

    fingerprints: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)


def make_plan(recipe: Recipe, store: Store, until: str = "", start: str = "") -> Plan:
    """Fingerprint every stage and see what is there. `until` leaves out what it does not need; everything from
    `start` on is made again."""
    wanted = _ancestors(recipe, until) if until else {node.name for node in recipe.nodes}
    again = _descendants(recipe, start) if start else set()
    before = {row.name: row for row in store.db.stages(recipe.name)}
    machine = this_machine(store.db.rate)
    known = _Known()
    steps = [
        _step(node, store, before, machine, known, node.name in again) for node in recipe.nodes if node.name in wanted
    ]
    return Plan(recipe, tuple(steps))


def describe(node: Node, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """All that the payload of a stage depends on, as JSON: what its fingerprint is the digest of."""
    config = node.stage.config_values()
    inputs: dict[str, Any] = {}
    for dotted, ref in node.stage.references().items():
        if dotted in node.parents:
            name, part = node.parents[dotted]
            inputs[dotted] = {"fingerprint": fingerprints[name], "part": part}
        else:
            inputs[dotted] = _identity(node.outside[ref.text])
        _blank(config, dotted)
    for dotted, source in node.stage.outside_sources().items():
        texts = [s.text for s in source] if isinstance(source, tuple) else [source.text]
        found = next(node.outside[text] for text in texts if text in node.outside)
        inputs[dotted] = _identity(found)
        _blank(config, dotted)
    return {"use": node.stage.use, "version": node.stage.version, "seed": node.seed, "config": config, "inputs": inputs}


def _identity(found: Outside) -> dict[str, str]:
    """Bytes and name count, the place does not: a reader may look at a file's ending."""
    return {"digest": found.digest, "name": found.name}


def _blank(config: Any, dotted: str) -> None:
    """Take a reference's text out of the config: what it points at counts, not how it is called."""
    *path, last = dotted.split(".")
    for part in path:
        config = _holder(config, part)
        config = config[int(part)] if isinstance(config, list) else config[part]
    config = _holder(config, last)
    config[int(last) if isinstance(config, list) else last] = "→"


def _holder(config: Any, part: str) -> Any:
    """What holds the key: a step of the refinery stands below its name, `{perplexity: {model: …}}`."""
    if isinstance(config, dict) and part not in config and len(config) == 1:
        return next(iter(config.values()))
    return config


def _step(
    node: Node, store: Store, before: Mapping[str, StageRow], machine: Machine, known: _Known, again: bool
) -> Step:
    description = describe(node, known.fingerprints)
    fingerprint = digest_of(description)
    known.fingerprints[node.name] = fingerprint
    sizes = {}
    for dotted, ref in node.stage.references().items():
        if dotted in node.parents:
            name, part = node.parents[dotted]
            sizes[ref.text] = known.sizes.get(f"{name}.{part}" if part else name, Size())
        else:
            sizes[ref.text] = _raw_size(node.outside[ref.text])
    for found in node.outside.values():
        sizes.setdefault(found.text, _raw_size(found))
    estimate = node.stage.estimate(sizes, replace(machine, execution=node.execution))
    estimate = replace(estimate, notes=(*estimate.notes, *node.stage.advice(sizes)))
    status, why = _status(node, description, fingerprint, store, before.get(node.name), again)
    for part in node.stage.output_kinds():
        measured = _measured_size(store, node, fingerprint, part) if status == "cached" else None
        known.sizes[f"{node.name}.{part}" if part else node.name] = measured or estimate.sizes.get(part, Size())
    return Step(node, fingerprint, description, status, tuple(why), estimate)


def _status(
    node: Node, description: dict[str, Any], fingerprint: str, store: Store, earlier: StageRow | None, again: bool
) -> tuple[Status, list[str]]:
    if again:
        return "make", [t("made again because of --from")]
    if store.has(node.stage.use, fingerprint):
        return "cached", []
    why = (
        _differences(earlier.facts["description"], description)
        if earlier and earlier.fingerprint != fingerprint
        else []
    )
    if store.work_folder(fingerprint).is_dir():
        return "resume", [*why, t("was interrupted and goes on")]
    return "make", why or [t("was never made")]


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Every place where two descriptions differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    if old == new:
        return []
    name = path.removeprefix("config.")
    if path.startswith("inputs."):
        dotted = path.removeprefix("inputs.").rsplit(".", 1)[0]
        return [t("the input {key} changed", key=dotted)]
    if isinstance(old, str) and isinstance(new, str) and len(old) + len(new) > 80:
        return [t("{key} changed", key=name)]
    return [f"{name}: {json.dumps(old, ensure_ascii=False)} → {json.dumps(new, ensure_ascii=False)}"]


def _raw_size(found: Outside) -> Size:
    base = found.path if found.path.is_dir() else found.path.parent
    total = found.size or sum((base / name).stat().st_size for name in found.files if (base / name).is_file())
    config = _config_of(found.path)
    width = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    return Size(rows=total / 500, bytes=total, tokens=total / 4, parameters=total / width, config=config)


def _config_of(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json` (an adapter's is its base's); empty where there is none."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        folder = Path(json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") or folder)
    file = folder / "config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _measured_size(store: Store, node: Node, fingerprint: str, part: str) -> Size | None:
    """What a finished artifact says of its own size (metrics rows, bytes, tokens, parameters)."""
    folder = store.path(node.stage.use, fingerprint)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    metrics = manifest["outputs"].get(part, {}).get("metrics", {})
    numbers = {
        name: float(metrics[name])
        for name in ("rows", "bytes", "tokens", "parameters")
        if isinstance(metrics.get(name), (int, float))
    }
    config = _config_of(folder / part)
    return Size(**numbers, config=config) if numbers or config else None


def _ancestors(recipe: Recipe, name: str) -> set[str]:
    node = recipe.node(name)
    return {name}.union(*(_ancestors(recipe, parent) for parent, _ in node.parents.values()))


def _descendants(recipe: Recipe, name: str) -> set[str]:
    found = {recipe.node(name).name}
    for node in recipe.nodes:  # in running order, so one pass is enough
        if any(parent in found for parent, _ in node.parents.values()):
            found.add(node.name)
    return found
