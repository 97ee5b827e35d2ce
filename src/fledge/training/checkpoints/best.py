"""Measuring held-out rows while a run goes on, keeping the best weights, and stopping when nothing gets better.

When it is measured follows from the steps alone, and so does where the run stops: killed and resumed, it stops there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fledge.training.settings import TrainSettings

FILE = "best.safetensors"


class Best:
    """The lowest loss on held-out rows so far, and the weights that had it (kept where there is patience to lose)."""

    def __init__(self, settings: TrainSettings, folder: Path | None, state: Mapping[str, Any]) -> None:
        self.every, self.patience, self.folder = settings.evaluate_every, settings.patience, folder
        self.value, self.step = state.get("best", float("inf")), int(state.get("best_step", 0))
        self.waited = int(state.get("waited", 0))
        """measurements since the best one"""
        self._kept: dict[str, Tensor] | None = None  # where there is no folder

    def due(self, step: int) -> bool:
        """Whether to measure after `step` steps."""
        return bool(self.every) and step % self.every == 0

    def measured(self, step: int, value: float, parameters: Mapping[str, Tensor], write: bool) -> None:
        """Take note of the loss after `step` steps, and keep the weights of the best (the process that may `write`)."""
        if not value < self.value:
            self.waited += 1
            return
        self.value, self.step, self.waited = value, step, 0
        if not self.patience:
            return
        weights = {name: p.detach().contiguous().cpu().clone() for name, p in parameters.items()}
        if self.folder is None:
            self._kept = weights
        elif write:
            self.folder.mkdir(parents=True, exist_ok=True)
            making = self.folder / f".{FILE}"
            save_file(weights, making)
            with making.open("rb") as stream:
                os.fsync(stream.fileno())
            making.replace(self.folder / FILE)

    @property
    def exhausted(self) -> bool:
        """Whether the run should stop."""
        return bool(self.patience) and self.waited >= self.patience

    def restore(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Put the best weights back, unless those of `step`, which are there, are the best."""
        if not self.patience or not self.step or self.step == step:
            return
        weights = self._kept if self.folder is None else load_file(self.folder / FILE)
        assert weights is not None
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.value, "best_step": self.step, "waited": self.waited} if self.step else {}

    def summary(self) -> dict[str, Any]:
        """The metrics of the run, where anything was measured."""
        return {"best_held_out_loss": self.value, "best_step": self.step} if self.step else {}
