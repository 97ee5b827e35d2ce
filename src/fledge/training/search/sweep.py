"""A sweep: the same recipe again and again with other settings, and which of them were best.

Every trial is the recipe with `--set`: the runner makes what is not there, so that stages which no varied setting
reaches are made once for all. Trials stand in a journal as they end. Killed, a sweep goes on where it was: with the
trial that was being made, whose stage goes on from its checkpoint.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fledge.core.artifact import MANIFEST, digest_of, write_atomic
from fledge.core.errors import FledgeError, Interrupted, Problem, StageFailed, did_you_mean, listing
from fledge.core.events import Listener
from fledge.core.language import t
from fledge.core.plan import make_plan
from fledge.core.recipe import Recipe, load
from fledge.core.runner import Runner
from fledge.core.store import Store
from fledge.training.search.pruning import Rule, Watch
from fledge.training.search.samplers import Method, sampler
from fledge.training.search.space import Dimension, Values
from fledge.training.search.trial import Journal, Trial

GIVE_UP = 3
"""Trials that may fail at the start before the fault is looked for in the recipe."""


@dataclass(frozen=True)
class Goal:
    """`base.bits_per_byte_en`: a metric of a stage's artifact (or, for a watch, of its events), and which way is up."""

    stage: str
    metric: str
    maximize: bool = False

    @classmethod
    def parse(cls, text: str, maximize: bool = False) -> Goal:
        """`stage.metric`, with `:max` where more is better. Raises FledgeError."""
        name, _, way = text.partition(":")
        stage, dot, metric = name.partition(".")
        if not dot or not stage or not metric or way not in ("", "max", "min"):
            raise FledgeError(
                Problem(t("a goal is stage.metric"), found=text, allowed="base.bits_per_byte_en, chat.accuracy:max")
            )
        return cls(stage, metric, maximize or way == "max")

    def better(self, a: float, b: float) -> bool:
        """Whether a is better than b."""
        return a > b if self.maximize else a < b


@dataclass(frozen=True)
class Sweep:
    """What to vary in a recipe, and what to look for. `folder` holds its journal, table and plot."""

    file: Path
    space: list[Dimension]
    goal: Goal
    trials: int
    store: Store
    settings: Sequence[str] = ()
    method: Method = "random"
    seed: int = 0
    stop: Rule | None = None
    watch: Goal | None = None
    listeners: Sequence[Listener] = ()

    @property
    def name(self) -> str:
        """The recipe's name and a digest of all that decides the trials, their number aside."""
        return f"{self._recipe({}).name}-sweep-{digest_of(self._header())[:8]}"

    @property
    def folder(self) -> Path:
        return self.store.runs / self.name

    def run(self, told: Callable[[Trial], None] = lambda trial: None) -> list[Trial]:
        """Try until there are enough trials or nothing is left to try; `told` hears of each, earlier ones too.

        Raises FledgeError for settings that the recipe does not take, before anything starts.
        """
        self._check()
        suggest = sampler(self.method, self.space, self.seed, self.goal.maximize, self.trials).suggest
        journal = Journal(self.folder / "trials.jsonl", self._header())
        for trial in journal.trials:
            told(trial)
        while len(journal.trials) < self.trials:
            values = suggest(journal.trials)
            if values is None:
                break
            journal.add(self._try(values, journal.trials))
            told(journal.trials[-1])
            if len(journal.trials) == GIVE_UP and all(trial.state == "failed" for trial in journal.trials):
                raise FledgeError(Problem(t("the first trials all failed"), found=journal.trials[-1].reason))
        self._write(journal.trials)
        return journal.trials

    def best(self, trials: Iterable[Trial]) -> Trial | None:
        """The finished trial with the best value; the first of equals."""
        found: Trial | None = None
        for trial in trials:
            if trial.value is not None and (found is None or self.goal.better(trial.value, found.value or 0.0)):
                found = trial
        return found

    # --- one trial -----------------------------------------------------------------------------------------------

    def _try(self, values: Values, earlier: Sequence[Trial]) -> Trial:
        number, started = len(earlier), time.monotonic()
        watched = self.watch or Goal(self.space[0].key.partition(".")[0], "loss")
        watch = Watch(watched.stage, watched.metric, watched.maximize, self.stop, earlier)
        recipe = self._recipe(values)
        plan = make_plan(replace(recipe, name=f"{self.name}.{number:03d}"), self.store, until=self.goal.stage)

        def ended(state: Any, value: float | None = None, reason: str = "") -> Trial:
            return Trial(number, values, state, value, watch.rungs, reason, round(time.monotonic() - started, 1))

        try:
            paths = Runner(plan, self.store, [*self.listeners, watch], "fledge sweep").run()
        except Interrupted:
            if not watch.hopeless:
                raise
            for step in plan.to_make:
                if step.name == watched.stage:  # nobody will go on with it
                    shutil.rmtree(self.store.work_folder(step.fingerprint), ignore_errors=True)
            return ended("pruned")
        except StageFailed as error:
            return ended("failed", reason="; ".join(filter(None, (p.found or p.what for p in error.problems))))
        value = metric_of(paths[self.goal.stage], self.goal)
        if not math.isfinite(value):
            return ended("failed", reason=f"{self.goal.metric}: {value}")
        return ended("complete", value)

    def _recipe(self, values: Values) -> Recipe:
        return load(self.file, [*self.settings, *settings_of(values)], self.store.db.digest)

    def _check(self) -> None:
        """Both ends of every range must be what the recipe takes, and the goals name stages of it."""
        recipe = self._recipe({})
        for goal in filter(None, (self.goal, self.watch)):
            recipe.node(goal.stage)
        for end in (0, 1):
            self._recipe({dimension.key: dimension.ends[end] for dimension in self.space})
        needed = make_plan(recipe, self.store, until=self.goal.stage)
        reached = {step.name for step in needed.steps} | {"execution", "seed"}
        for dimension in self.space:
            stage = dimension.key.removeprefix("stages.").partition(".")[0]
            if stage not in reached:
                raise FledgeError(
                    Problem(
                        t("{goal} does not depend on this setting", goal=f"{self.goal.stage}.{self.goal.metric}"),
                        where=f"--vary {dimension.key}",
                        allowed=listing(sorted(reached), 20),
                    )
                )

    def _header(self) -> dict[str, Any]:
        watch = vars(self.watch) if self.watch else None
        return {
            "recipe": self._recipe({}).text, "settings": list(self.settings), "method": self.method, "seed": self.seed,
            "space": [{"kind": type(d).__name__, **_plain(vars(d))} for d in self.space], "goal": vars(self.goal),
            "stop": self.stop, "watch": watch,
        }  # fmt: skip

    # --- what is kept --------------------------------------------------------------------------------------------

    def _write(self, trials: Sequence[Trial]) -> None:
        """`sweep.csv`, `study.json` and `study.svg` beside the journal."""
        keys = [dimension.key for dimension in self.space]
        goal = f"{self.goal.stage}.{self.goal.metric}"
        best = self.best(trials)
        with (self.folder / "sweep.csv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["trial", *keys, goal, "state", "seconds", "reason"])
            for trial in trials:
                values = [trial.values[key] for key in keys]
                table.writerow([trial.number, *values, trial.value, trial.state, trial.seconds, trial.reason])
        study = {
            "study": "sweep", "goal": goal, "maximize": self.goal.maximize, "method": self.method, "keys": keys,
            "trials": [trial.to_json() for trial in trials], "best": best.to_json() if best else None,
        }  # fmt: skip
        write_atomic(self.folder / "study.json", json.dumps(study, ensure_ascii=False, indent=1) + "\n")
        if best:
            from fledge.training.search.plot import plot_sweep

            plot_sweep(self.space, goal, trials, best, self.folder / "study.svg")


def settings_of(values: Values) -> list[str]:
    """The values as `--set` takes them."""
    return [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]


def metric_of(artifact: Path, goal: Goal) -> float:
    """A metric of an artifact, by a dotted name where it lies deeper. Raises FledgeError that lists what there is."""
    outputs = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))["outputs"]
    numbers: dict[str, float] = {}
    for part, output in outputs.items():
        numbers |= _numbers(output.get("metrics", {}), f"{part}." if part else "")
    if goal.metric not in numbers:
        raise FledgeError(
            Problem(
                t("the stage {stage} has no metric {name}", stage=goal.stage, name=goal.metric),
                allowed=listing(sorted(numbers), 40),
                fix=did_you_mean(goal.metric, numbers),
            )
        )
    return numbers[goal.metric]


def _numbers(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
