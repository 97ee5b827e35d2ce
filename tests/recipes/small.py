"""The recipes made small: every stage of them, on a little data, for a few steps, on one thread."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fledge.core.artifact import MANIFEST
from fledge.core.events import Event
from fledge.core.plan import make_plan
from fledge.core.recipe import Recipe, load
from fledge.core.runner import Runner
from fledge.core.store import Store

ROOT = Path(__file__).parents[2]

HATCH = (
    "execution.threads=1", "execution.compile=off",
    "dialogues.limit=250", "laws.limit=40", "talk_split.held_out=10kB", "text_split.held_out=10kB",
    "tokenizer.sample=300kB", "base.model.size=150k", "base.tokens=24k", "base.held_out_bytes=4kB",
    "chat.train.steps=6", "chat.held_out_rows=10",
    "preferences.samples=24", "preferences.dictionary_pairs=24", "preferences.max_new_tokens=24",
    "reward.train.epochs=1", "aligned.train.epochs=1",
    "scores.tasks.0.bytes=4kB", "scores.tasks.1.limit=8", "scores.tasks.2.limit=8", "scores.tasks.3.max_new_tokens=8",
)  # fmt: skip

ADAPT = (
    "execution.threads=1", "execution.compile=off",
    "dialogues.limit=40", "split.held_out=2kB", "identity.count=20",
    "sft.train.steps=2", "sft.train.batch_size=2", "sft.train.max_length=64", "sft.held_out_rows=2",
    "dpo.train.steps=1", "dpo.train.batch_size=2", "dpo.train.max_length=64",
    "int8.tokens=256", "gguf.tokens=256",
    "scores.tasks.0.limit=2", "scores.tasks.1.limit=2", "scores.tasks.1.max_new_tokens=8",
    "scores.tasks.2.limit=2", "scores.tasks.3.limit=2", "scores.tasks.4.max_new_tokens=8",
)  # fmt: skip


def recipe(name: str, settings: tuple[str, ...]) -> Recipe:
    """A recipe of the repository with these settings."""
    return load(ROOT / "recipes" / f"{name}.yaml", settings)


def fledge(*arguments: str, home: Path, code: int = 0) -> str:
    """What `fledge …` prints with its store at `home`."""
    environment = {**os.environ, "FLEDGE_HOME": str(home), "FLEDGE_LANG": "en", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "fledge.cli.main", *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def run(name: str, settings: tuple[str, ...], home: Path) -> dict[str, Any]:
    """Run a recipe as a user does; what `fledge show --json` says of it."""
    fledge("run", f"recipes/{name}.yaml", *(f"--set={setting}" for setting in settings), home=home)
    return dict(json.loads(fledge("show", name, "--json", home=home)))


def manifests(paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """`artifact.json` of every stage."""
    return {name: json.loads((path / MANIFEST).read_text(encoding="utf-8")) for name, path in paths.items()}


class Killer:
    """A listener that kills the running child at its `at`-th event of a stage, and so on for every seeded point."""

    def __init__(self, points: dict[str, int]) -> None:
        self.points, self.killed, self.runner = dict(points), [], None

    def hear(self, event: Event) -> None:
        """Count down; at zero, SIGKILL to the child's whole process group."""
        if event.kind == "stage" or event.stage not in self.points:
            return
        self.points[event.stage] -= 1
        if self.points[event.stage] <= 0 and self.runner is not None and self.runner.process is not None:
            del self.points[event.stage]
            self.killed.append(event.stage)
            os.killpg(self.runner.process.pid, signal.SIGKILL)


def run_with_kills(recipe: Recipe, store: Store, points: dict[str, int]) -> tuple[dict[str, Path], list[str]]:
    """Run until nothing is killed any more; the artifacts and the stages that were killed."""
    from fledge.core.errors import StageFailed

    killer = Killer(points)
    for _ in range(len(points) + 1):
        runner = killer.runner = Runner(make_plan(recipe, store), store, [killer])
        try:
            return runner.run(), killer.killed
        except StageFailed as error:
            assert "SIGKILL" in str(error), error
    raise AssertionError("still killed after every point was used")


def random_points(recipe: Recipe, count: int, seed: int) -> dict[str, int]:
    """Seeded points in `count` different stages: after how many events of its own each is killed."""
    rng = random.Random(seed)
    names = [node.name for node in recipe.nodes]
    return {name: rng.randint(1, 4) for name in rng.sample(names, min(count, len(names)))}
