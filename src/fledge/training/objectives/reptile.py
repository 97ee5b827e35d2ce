"""Reptile: weights from which a few steps suffice to learn a new task (Nichol, Achiam and Schulman, 2018).

    for every task τ of a batch: φ̃ = inner steps of SGD or Adam on τ, beginning at φ
    φ ← φ + ε · mean(φ̃ − φ)                                                             (their algorithm 2)

That outer step is one of gradient descent at rate ε along φ − φ̃, which they propose as well (section 2); so the
Trainer makes it with any optimizer (`sgd` is the algorithm as it stands), and tasks are rows: they may be divided
among processes and micro-batches, and a run resumes exactly. The loss that is reported is the mean of the tasks' own
loss on the last inner step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fledge.training.objective import Batch, Objective, Term, rows_of

InnerOptimizer: TypeAlias = Literal["adam", "sgd"]


@dataclass(frozen=True)
class Inner:
    """The inner loop: `objective` minimised for as many steps as there are batches, at the rate `lr`.

    Adam with β₁ = 0, as in the paper's experiments, or plain SGD; its state begins anew with every task.
    """

    objective: Objective
    lr: float
    optimizer: InnerOptimizer = "adam"

    def adapt(self, model: nn.Module, batches: Batch) -> list[Tensor]:
        """Change the model by a step a row of `batches` (inner steps, rows, …); the loss before each step."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(trained, self.lr)
            if self.optimizer == "sgd"
            else torch.optim.Adam(trained, self.lr, betas=(0.0, 0.999))
        )
        losses = []
        for step in range(rows_of(batches)):
            loss = self.loss(model, {name: value[step] for name, value in batches.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.clear_autocast_cache()  # copies of the weights as they were
            losses.append(loss.detach())
        return losses

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The objective's mean over the rows of `batch`."""
        terms = self.objective.loss(self.objective.forward({"model": model}, batch), batch)
        totals = self.objective.weights(batch)
        parts = [term.coefficient * term.sum / totals[name] for name, term in terms.items() if term.coefficient]
        return torch.stack(parts).sum()


class Reptile(Objective):
    """Batches of tasks: the inner objective's arrays with two more axes before them, (tasks, inner steps, …)."""

    def __init__(self, inner: Inner) -> None:
        self.inner = inner
        self.dropout = inner.objective.dropout  # type: ignore[misc]

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"adapted_loss": float(rows_of(batch))}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Σ ⟨φ, φ − φ̃⟩ with φ̃ constant, whose gradient is Σ (φ − φ̃); Σ of the first and of the last inner losses."""
        trained = [p for p in models["model"].parameters() if p.requires_grad]
        fast = copy.deepcopy(models["model"])  # a checkpoint may be reading the weights of the other
        learned = [p for p in fast.parameters() if p.requires_grad]
        moved = [torch.zeros_like(p) for p in trained]
        first, last = torch.zeros((), device=moved[0].device), torch.zeros((), device=moved[0].device)
        for task in range(rows_of(batch)):
            with torch.no_grad():
                torch._foreach_copy_(learned, trained)
            losses = self.inner.adapt(fast, {name: value[task] for name, value in batch.items()})
            first, last = first + losses[0], last + losses[-1]
            with torch.no_grad():
                torch._foreach_add_(moved, torch._foreach_sub(trained, learned))
        with torch.autocast(moved[0].device.type, enabled=False):
            slope = torch.stack([(p * m).sum() for p, m in zip(trained, moved, strict=True)]).sum()
        return slope, first, last

    def loss(self, outputs: tuple[Tensor, Tensor, Tensor], batch: Batch) -> dict[str, Term]:
        slope, first, last = outputs
        tasks = rows_of(batch)
        return {
            "adapted_loss": Term(last + slope - slope.detach(), tasks),
            "start_loss": Term(first, tasks, coefficient=0.0),
        }
