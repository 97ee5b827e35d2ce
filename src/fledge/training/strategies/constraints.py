"""What a run does to its gradients beside the objective: penalties are added, and what is still frozen goes without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fledge.core.language import t
from fledge.training.strategies.penalty import L2SP
from fledge.training.strategies.unfreezing import Thaw

if TYPE_CHECKING:
    from fledge.training.trainer import Trainer


class Constraints:
    """The penalties and the unfreezing of one run. Made while the parameters are as the run begins with them."""

    def __init__(self, trainer: Trainer, parameters: Mapping[str, Tensor]) -> None:
        settings = trainer.settings
        self.trainer, self.parameters = trainer, parameters
        self.penalties = [*trainer.penalties, *([L2SP(settings.l2_sp)] if settings.l2_sp else [])]
        for penalty in self.penalties:
            penalty.hold(parameters)
        models = {name: trainer.models[name] for name in trainer.objective.trainable}
        whole = trainer.spread.ranks.mesh is None
        self.thaw = Thaw(settings.unfreeze, models, parameters, trainer.steps, whole) if settings.unfreeze else None
        if self.thaw and (never := self.thaw.never):
            trainer.events.message(
                t("{count} parameters are never trained: the run ends before they join", count=len(never)), "warning"
            )

    def begin(self, step: int) -> None:
        """Before the forward pass of `step`."""
        if self.thaw:
            self.thaw.begin(step)

    def shape(self, step: int) -> dict[str, float]:
        """After the gradients of `step` have been summed: what is to be reported."""
        trained = self.parameters
        if self.thaw:
            self.thaw.drop(step)
            trained = {name: p for name, p in trained.items() if self.thaw.trains(name, step)}
        spread = self.trainer.spread
        values = [penalty.add(trained, spread.share_of) for penalty in self.penalties]
        if values and spread.ranks.mesh is not None:
            table = torch.tensor(values, dtype=torch.float64, device=spread.device)
            spread.ranks.sum([table])
            values = table.tolist()
        return dict(zip((penalty.name for penalty in self.penalties), values, strict=True))

    def end(self) -> None:
        """After the last step."""
        if self.thaw:
            self.thaw.end()
