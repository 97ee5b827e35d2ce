"""Who hears the stream of events beside the console: programs that keep and compare curves.

TensorBoard's files are always written. MLflow, Weights & Biases and trackio are asked for: in a recipe's header
(`log: [mlflow, wandb]`), by `FLEDGE_LOG=mlflow,wandb`, or by `fledge run --log mlflow,wandb`; the nearest to the
command wins. All of them write below the run's folder and speak to no other machine, unless the user's own environment
names one (`MLFLOW_TRACKING_URI`, `WANDB_MODE=online`, `TRACKIO_SPACE_ID`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

from fledge.core.errors import FledgeError, Problem, did_you_mean, missing_extra
from fledge.core.language import t
from fledge.core.listeners.mlflow import MLflow
from fledge.core.listeners.tensorboard import TensorBoard
from fledge.core.listeners.tracker import Told, Tracker
from fledge.core.listeners.trackio import Trackio
from fledge.core.listeners.wandb import WeightsAndBiases
from fledge.core.plan import Plan, Step
from fledge.core.store import Store

TRACKERS: dict[str, type[Tracker]] = {"mlflow": MLflow, "wandb": WeightsAndBiases, "trackio": Trackio}
ALWAYS = "tensorboard"


def chosen(flag: str | None = None, recipe: Iterable[str] = ()) -> list[str]:
    """The names asked for: on the command line, else in `FLEDGE_LOG`, else in the recipe.

    Raises FledgeError for a name that is none, and for a program that is not installed.
    """
    given = flag if flag is not None else os.environ.get("FLEDGE_LOG")
    names = list(recipe) if given is None else [name.strip() for name in given.split(",")]
    names = [name for name in dict.fromkeys(names) if name and name != ALWAYS]
    for name in names:
        if name not in TRACKERS:
            known = [ALWAYS, *TRACKERS]
            raise FledgeError(
                Problem(
                    t("there is no such program to log to"),
                    where="log",
                    found=name,
                    allowed=", ".join(known),
                    fix=did_you_mean(name, known),
                )
            )
        for module in TRACKERS[name].modules:
            if importlib.util.find_spec(module) is None:
                raise missing_extra(module, "monitor")
    return names


def open_listeners(names: Iterable[str], plan: Plan, store: Store) -> list[TensorBoard | Tracker]:
    """TensorBoard's files, and the programs called `names`, for one run of `plan`."""
    folder = store.runs / plan.recipe.name
    stages = {
        step.name: Told(
            step.name, step.use, plan.recipe.name, step.fingerprint, step.node.seed, _parameters(step),
            store.path(step.use, step.fingerprint),
        )
        for step in plan.steps
    }  # fmt: skip
    trackers = [TRACKERS[name](stages, folder / name) for name in names]
    return [TensorBoard(folder / ALWAYS), *trackers]


def _parameters(step: Step) -> dict[str, object]:
    """The stage's config and how it is carried out, as flat names and plain values."""
    execution = {f"execution.{key}": value for key, value in step.node.execution.model_dump().items()}
    return {**flat(step.node.stage.config_values()), **execution}


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Nested settings with dotted names: {"train": {"lr": 1}} → {"train.lr": 1}; an empty list stays one."""
    if isinstance(value, dict) and value:
        pairs: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, list) and value:
        pairs = enumerate(value)
    else:
        return {prefix: value} if prefix else {}
    return {k: v for key, item in pairs for k, v in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}
