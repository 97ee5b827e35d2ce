"""Contrastive learning and Reptile on two processes, with gradients of all of them: the result of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from fledge.core.events import Emitter, Event
from fledge.training.layout.ranks import Ranks
from fledge.training.objective import Objective
from fledge.training.objectives.contrastive import Contrastive
from fledge.training.objectives.reptile import Inner, Reptile
from fledge.training.objectives.sequence_classification import SequenceClassification
from fledge.training.trainer import Trainer
from tests.training.test_understanding_objectives import model_of, pairs, rows
from tests.training.toys import settings


class Pairs:
    def batch(self, step: int) -> Any:
        return pairs(6, negatives=True, seed=20 * step)


class Tasks:
    """Three tasks a step, two inner batches each: an uneven share for two processes."""

    def batch(self, step: int) -> Any:
        found = [[rows(4, 9, seed=100 * step + 10 * task + i) for i in range(2)] for task in range(3)]
        return {name: torch.stack([torch.stack([b[name] for b in task]) for task in found]) for name in found[0][0]}


def train(ranks: Ranks, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Both trainings: the curves of losses and gradient norms; the weights are written to `folder`."""
    cases: dict[str, tuple[Objective, Any, Any]] = {
        "contrastive": (Contrastive(0.1, "mean", 2, ranks), model_of("bert", AutoModel), Pairs()),
        "reptile": (
            Reptile(Inner(SequenceClassification(), 1e-2)),
            model_of("llama", AutoModelForSequenceClassification, num_labels=3),
            Tasks(),
        ),
    }
    curves: dict[str, dict[str, list[float]]] = {}
    for name, (objective, model, source) in cases.items():
        heard: list[Event] = []
        chosen = settings(optimizer="sgd", lr=0.1, grad_clip=0, warmup=0)
        Trainer(
            objective, {"model": model}, source, chosen, 4, 0, Emitter("x", 0, heard.append), ranks=ranks
        ).fit()  # fmt: skip
        curves[name] = {key: [e.value for e in heard if e.name == key] for key in ("loss", "grad_norm", "accuracy")}
        save_file({n: p.detach() for n, p in model.named_parameters()}, folder / f"{name}{ranks.rank}.safetensors")
    return curves


RANK = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from fledge.training.layout.ranks import Ranks
from tests.training.test_understanding_layouts import train
rank = int(os.environ["RANK"])
train(Ranks.join(rank, 2), Path(sys.argv[1]))
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_losses_gradients_and_weights_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = RANK.format(root=str(Path(__file__).parents[2]))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(21_000 + os.getpid() % 20_000), "WORLD_SIZE": "2"}
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, **meeting, "RANK": "1"})
    (tmp_path / "alone").mkdir()
    alone = train(Ranks(), tmp_path / "alone")
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    try:
        together = train(Ranks.join(0, 2), tmp_path)
    finally:
        torch.distributed.destroy_process_group()
    assert other.wait(timeout=120) == 0
    for name, curves in alone.items():
        for key, values in curves.items():
            torch.testing.assert_close(torch.tensor(together[name][key]), torch.tensor(values), rtol=1e-4, atol=1e-6)
        first, second = (load_file(tmp_path / f"{name}{rank}.safetensors") for rank in (0, 1))
        whole = load_file(tmp_path / "alone" / f"{name}0.safetensors")
        for key, weights in whole.items():
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(first[key], weights, rtol=1e-4, atol=1e-6)
