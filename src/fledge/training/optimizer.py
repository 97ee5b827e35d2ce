"""Optimisers: AdamW (Loshchilov & Hutter, 2019), Muon (Jordan, 2024) for the matrices inside the layers, or Adafactor.

Only matrices are decayed: not norms and biases, and not embeddings, whose rare rows would shrink without ever being
used. Muon replaces a matrix's momentum by the nearest semi-orthogonal matrix; embeddings, the output layer, norms and
biases stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fledge.training.settings import TrainSettings


def build_optimizers(models: Iterable[nn.Module], settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """The optimisers for every parameter of `models` that is trained. Each group remembers its peak as `peak_lr`."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for model in models:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        embeddings |= {id(head.weight)} if isinstance(head, nn.Linear) else set()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            inner = parameter.ndim == 2 and id(parameter) not in embeddings
            (matrices if inner else others).append(parameter)
    groups = [{"params": others, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if settings.optimizer == "muon" and matrices:
        decay = settings.weight_decay
        optimizers.append(torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=decay, momentum=0.95))
    else:
        groups.append({"params": matrices, "weight_decay": settings.weight_decay})
    groups = [group for group in groups if group["params"]]
    if groups and settings.optimizer == "adafactor":
        optimizers.append(torch.optim.Adafactor(groups, lr=settings.lr))
    elif groups:
        options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "fused": True}
        optimizers.append(torch.optim.AdamW(groups, **options))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> float:
    """Set every group to `factor` of its peak; returns the last one's rate (AdamW's)."""
    rate = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["lr"] = group["peak_lr"] * factor
    return rate


def clip(parameters: Iterable[Tensor], bound: float) -> float:
    """The norm of the whole gradient in fp32, before it was scaled down to `bound` (0: left as it is)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack([g.norm(dtype=torch.float32) for g in gradients])).item()
    if bound and norm > bound:
        torch._foreach_mul_(gradients, bound / norm)
    return norm
