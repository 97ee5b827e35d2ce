"""Optimisers: AdamW (Loshchilov & Hutter, 2019), Muon (Jordan, 2024) for the matrices inside the layers, or Adafactor.

Only matrices are decayed: not norms and biases, and not embeddings, whose rare rows would shrink without ever being
used. Muon replaces a matrix's momentum by the nearest semi-orthogonal matrix; embeddings, the output layer, norms and
biases stay with AdamW.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.training.settings import TrainSettings


def build_optimizers(models: Iterable[nn.Module], settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """The optimisers for every parameter of `models` that is trained. Each group remembers its peak as `peak_lr`."""
    matrices, decayed, others = _Groups(), _Groups(), _Groups()
    for model in models:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        embeddings |= {id(head.weight)} if isinstance(head, nn.Linear) else set()
        shares = lr_shares(model, settings.layer_lr_decay)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                inner = parameter.ndim == 2 and id(parameter) not in embeddings
                groups = (matrices if settings.optimizer == "muon" else decayed) if inner else others
                groups.setdefault(shares[name], []).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        groups = matrices.with_options(settings.muon_lr)
        optimizers.append(torch.optim.Muon(groups, weight_decay=settings.weight_decay, momentum=0.95))
    rest = [
        *others.with_options(settings.lr, weight_decay=0.0),
        *decayed.with_options(settings.lr, weight_decay=settings.weight_decay),
    ]
    if rest and settings.optimizer == "adafactor":
        optimizers.append(torch.optim.Adafactor(rest))
    elif rest:
        optimizers.append(torch.optim.AdamW(rest, betas=settings.betas, eps=settings.eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class _Groups(dict[float, list[Tensor]]):
    """Parameters by their share of the peak rate, the largest share last."""

    def with_options(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        return [{"params": self[share], "lr": lr * share, **options} for share in sorted(self)]


_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


def lr_shares(model: nn.Module, decay: float) -> dict[str, float]:
    """Each parameter's share of the peak rate: `decay` to the power of how far below the head it stands.

    Discriminative fine-tuning (Howard and Ruder, 2018, section 3.2): the head and the last norm 1, the last layer
    `decay`, the one below it decay², …, the embeddings least.
    """
    found = {name: _LAYER.search(name) for name, _ in model.named_parameters()}
    layers = 1 + max((int(match[1]) for match in found.values() if match), default=-1)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    shares = {}
    for name, parameter in model.named_parameters():
        match = found[name]
        below = layers - int(match[1]) if match else (layers + 1) * (id(parameter) in embeddings)
        shares[name] = decay**below
    return shares


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Leave the parameters whose names match one of the globs as they are.

    Raises FledgeError for a pattern that matches nothing, and where nothing would be left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise FledgeError(
                Problem(
                    t("no parameter has such a name"),
                    where="train.freeze",
                    found=pattern,
                    allowed=listing(names, 8),
                )
            )
        for name in matched:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FledgeError(Problem(t("nothing is left to train"), where="train.freeze", found=listing(list(patterns))))


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> float:
    """Set every group to `factor` of its peak; returns the highest of the last optimiser's (AdamW's)."""
    rate = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        rate = max(group["lr"] for group in optimizer.param_groups)
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
