"""A listener that keeps runs for Weights & Biases, as files of the run's folder. Nothing leaves the machine unless
`WANDB_MODE=online` is in the user's environment; `wandb sync .fledge/runs/NAME/wandb/wandb/offline-run-*` sends it
later."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fledge.core.listeners.tracker import Told, Tracker


class WeightsAndBiases(Tracker):
    """One project a recipe, one run a stage. A stage that goes on writes another file of the same run."""

    modules: ClassVar[tuple[str, ...]] = ("wandb",)

    def begin(self, told: Told, identity: str) -> tuple[Any, str]:
        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        if mode != "online":
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # its own crash reports go over the network
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, disable_code=True,
            x_disable_stats=True, x_disable_meta=mode != "online",
        )  # fmt: skip
        name = identity or uuid.uuid4().hex[:12]
        run = wandb.init(
            project=told.recipe, id=name, name=told.stage, group=told.recipe, job_type=told.use,
            dir=str(self.folder), mode=mode, tags=[told.use, told.fingerprint[:16]],
            config={**told.parameters, **told.tags}, reinit="create_new", settings=settings,
            resume="allow" if mode == "online" else None,
        )  # fmt: skip
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")  # its own counter refuses a point that is told late
        return run, name

    def points(self, run: Any, step: int, values: Mapping[str, float], when: float) -> None:
        run.log({**values, "step": step, "_timestamp": when})

    def end(self, run: Any, status: str, step: int, metrics: Mapping[str, float], artifact: Path | None) -> None:
        run.summary.update(dict(metrics))
        run.finish(exit_code=0 if status == "finished" else 1)
