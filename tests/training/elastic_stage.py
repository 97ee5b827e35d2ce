"""A stage that trains a very small network in two processes, one of which kills itself, once. The child process imports
it by name (`FLEDGE_STAGES=elastic_stage`)."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fledge.core.artifact import Model
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.stage import Stage
from fledge.training.layout.ranks import Ranks
from fledge.training.objective import Batch, Objective, Term
from fledge.training.settings import TrainSettings
from fledge.training.trainer import Trainer

STEPS = 12


class Squares(Objective):
    """Squared error of a small network: quick to import, as every process must."""

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"squares": float(len(batch["x"]))}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> Tensor:
        return models["model"](batch["x"])

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Term]:
        return {"squares": Term((outputs - batch["y"]).square().sum(), len(batch["x"]))}


class Rows:
    """Random rows; at one step this process dies, if it is told to."""

    def __init__(self, dies_at: int = -1) -> None:
        self.dies_at = dies_at

    def batch(self, step: int) -> dict[str, np.ndarray]:
        if step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rng = np.random.default_rng(step)
        x = rng.standard_normal((8, 4), dtype=np.float32)
        return {"x": x, "y": np.sin(3 * x[:, :2])}


def train(
    folder: Path | str | None, ranks: Ranks | None = None, dies_at: int = -1, say: Callable[[Event], Any] = bool
) -> nn.Module:
    """Twelve steps with a checkpoint after every second one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    settings = TrainSettings(lr=1e-2, dtype="float32", checkpoint_every=2, schedule="constant", log_every=1)
    run = Trainer(Squares(), {"model": model}, Rows(dies_at), settings, STEPS, 7, Emitter("x", 0, say), folder)
    run.ranks = ranks or Ranks()
    run.fit()
    return model


def digest(model: nn.Module) -> str:
    """SHA-256 of the weights."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


class Elastic(Stage, use="toy.elastic", version=1):
    """A run that nothing happens to, and one in which the second process kills itself in the first attempt."""

    def run(self, job: Job) -> Model:
        torch.set_num_threads(1)
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        ranks = Ranks.join(job.rank, job.world)
        for name, dies_at in (("whole", -1), ("killed", 7 if job.rank == 1 and attempt == "0" else -1)):
            found = digest(train(f"{job.checkpoints}/{name}", ranks, dies_at))
            (job.work / f"{name}-{job.rank}-{attempt}").write_text(found)
        return Model(job.out)
