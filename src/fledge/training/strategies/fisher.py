"""The diagonal of the Fisher information of a task, estimated from some of its rows.

The estimator is the *empirical* Fisher of whole rows: for every row by itself, the gradient of its log-likelihood
Σₜ log p(token t | those before it) is squared, elementwise; the squares of all rows are added and divided by the number
of tokens learned from:

    F = Σ_rows (∇ Σₜ log pₜ)² ÷ Σ_rows tokens

Squares of a batch's mean gradient would be too small by about the size of the batch, and more the less rows agree. The
labels are the data's, not draws from the model. The division by tokens puts F on the scale of a loss that is a mean
over tokens, so that λ (`ewc.strength`) is how many times the new task's tokens the old task counts.

The sum and the rows done are kept beside the stage's checkpoints: killed, it goes on where it was, to the same bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fledge.training.layout.ranks import Ranks
from fledge.training.likelihood import IGNORED, head_of, hidden_states, shifted, weighted_nll
from fledge.training.objective import Batch

SECONDS_BETWEEN_SAVES = 20.0


def row_nll(model: Any, row: Batch) -> tuple[Tensor, int]:
    """Σ −log p of the labels of one row (1, T) of a causal language model, and how many there are."""
    labels = shifted(row["labels"])
    total, _ = weighted_nll(hidden_states(model, row), head_of(model), labels)
    return total, int((labels != IGNORED).sum())


def fisher_diagonal(
    model: nn.Module,
    rows: Sequence[Batch],
    file: Path | None = None,
    ranks: Ranks | None = None,
    nll: Callable[[Any, Batch], tuple[Tensor, int]] = row_nll,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """F of every parameter that is trained, by name, in fp32 (fp64 where the model is).

    `nll` gives a row's Σ −log p and its tokens. With `file` the work is kept there. Each process asks its share of the
    rows. The model is asked as it answers, without dropout; its gradients are gone afterwards.
    """
    ranks = ranks or Ranks()
    share = ranks.share(len(rows))
    mine = rows[share]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    known = {"rows": str(len(rows)), "share": f"{share.start}:{share.stop}"}
    file = file.with_name(f"{file.stem}-{ranks.rank}{file.suffix}") if file and ranks.world > 1 else file
    sums, done, tokens = _read(file, known) if file else ({}, 0, 0)
    sums = sums or {
        name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in trained.items()
    }
    sums = {name: sums[name].to(p.device) for name, p in trained.items()}
    was_training, saved = model.training, time.monotonic()
    model.eval()
    for number in range(done, len(mine)):
        loss, count = nll(model, mine[number])
        loss.backward()
        for name, parameter in trained.items():
            if parameter.grad is not None:
                gradient = parameter.grad.to(sums[name].dtype)
                sums[name].addcmul_(gradient, gradient)
                parameter.grad = None
        tokens += count
        progress(number + 1, len(mine))
        last = number + 1 == len(mine)
        if file and (last or time.monotonic() - saved > SECONDS_BETWEEN_SAVES):
            _write(file, sums, {**known, "done": str(number + 1), "tokens": str(tokens)})
            saved = time.monotonic()
    model.train(was_training)
    counted = torch.tensor([float(tokens)], dtype=torch.float64, device=next(model.parameters()).device)
    ranks.sum([counted])
    ranks.sum(sums.values())
    return {name: value.div_(max(1.0, float(counted))) for name, value in sums.items()}


def _write(file: Path, sums: Mapping[str, Tensor], known: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    making = file.with_name(f".{file.name}")
    save_file({name: value.cpu() for name, value in sums.items()}, making, known)
    with making.open("rb") as stream:
        os.fsync(stream.fileno())
    making.replace(file)


def _read(file: Path, known: Mapping[str, str]) -> tuple[dict[str, Tensor], int, int]:
    """What is there of the same rows; nothing where the file is missing, damaged or of another division."""
    try:
        with safe_open(file, "pt") as held:
            about = held.metadata() or {}
            if any(about.get(key) != value for key, value in known.items()):
                return {}, 0, 0
            names = held.keys()
            return {name: held.get_tensor(name) for name in names}, int(about["done"]), int(about["tokens"])
    except (OSError, SafetensorError):
        return {}, 0, 0
