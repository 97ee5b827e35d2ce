"""Optimisers: AdamW (Loshchilov & Hutter, 2019), also with 8-bit moments, Muon (Jordan, 2024) for the matrices inside
the layers, or Adafactor.

Only matrices are decayed: not norms and biases, and not embeddings, whose rare rows would shrink without ever being
used. Muon replaces a matrix's momentum by the nearest semi-orthogonal matrix; embeddings, the output layer, norms and
biases stay with AdamW.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.training.optimization.eight_bit import adamw_8bit
from fledge.training.optimization.fused_muon import FusedMuon, parts_of
from fledge.training.settings import TrainSettings
from fledge.training.strategies.depth import depths


def build_optimizers(models: Iterable[nn.Module], settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """The optimisers for every parameter of `models` that is trained. Each group remembers its peak as `peak_lr`."""
    matrices, decayed, others = _Groups(), _Groups(), _Groups()
    parts: dict[int, int] = {}
    for model in models:
        parts |= parts_of(model)
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        embeddings |= {id(head.weight)} if isinstance(head, nn.Linear) else set()
        shares = lr_shares(model, settings.layer_lr_decay)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                inner = parameter.ndim == 2 and id(parameter) not in embeddings
                groups = (matrices if settings.optimizer == "muon" else decayed) if inner else others
                groups.setdefault(shares[name], []).append(parameter)
    optimizers = list(_muons(matrices, parts, settings))
    rest = [
        *others.with_options(settings.lr, weight_decay=0.0),
        *decayed.with_options(settings.lr, weight_decay=settings.weight_decay),
    ]
    if rest and settings.optimizer == "adafactor":
        optimizers.append(torch.optim.Adafactor(rest))
    elif rest and settings.optimizer == "sgd":
        optimizers.append(torch.optim.SGD(rest))
    elif decayed and settings.optimizer == "adamw8bit":
        inner = decayed.with_options(settings.lr, weight_decay=settings.weight_decay)
        optimizers.append(adamw_8bit(inner, settings))
        rest = others.with_options(settings.lr, weight_decay=0.0)
    if rest and settings.optimizer in ("adamw", "muon", "adamw8bit"):
        optimizers.append(torch.optim.AdamW(rest, betas=settings.betas, eps=settings.eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _muons(matrices: _Groups, parts: Mapping[int, int], settings: TrainSettings) -> Iterator[torch.optim.Optimizer]:
    """Muon for matrices as linear layers have them, and for those that stand otherwise (`parts` of them in one)."""
    plain, fused = [], []
    for group in matrices.with_options(settings.muon_lr):
        by_parts: dict[int, list[Tensor]] = {}
        for parameter in group["params"]:
            by_parts.setdefault(parts.get(id(parameter), 0), []).append(parameter)
        plain += [{**group, "params": by_parts[0]}] if 0 in by_parts else []
        fused += [{**group, "params": by_parts[n], "parts": n} for n in sorted(by_parts) if n]
    if plain:
        yield torch.optim.Muon(plain, weight_decay=settings.weight_decay, momentum=0.95)
    if fused:
        yield FusedMuon(fused, weight_decay=settings.weight_decay)


class _Groups(dict[float, list[Tensor]]):
    """Parameters by their share of the peak rate, the largest share last."""

    def with_options(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        return [{"params": self[share], "lr": lr * share, **options} for share in sorted(self)]


def lr_shares(model: nn.Module, decay: float) -> dict[str, float]:
    """Each parameter's share of the peak rate: `decay` to the power of how far below the head it stands.

    Discriminative fine-tuning (Howard and Ruder, 2018, section 3.2): the head and the last norm 1, the last layer
    `decay`, the one below it decay², …, the embeddings least.
    """
    return {name: decay**below for name, below in depths(model).items()}


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
