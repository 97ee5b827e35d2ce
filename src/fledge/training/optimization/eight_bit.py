"""AdamW with 8-bit moments (Dettmers et al., 2022): a byte for each, and a scale for every 256 of them.

Two bytes a parameter instead of eight. Only matrices inside the layers are kept so: embeddings (as the paper advises in
section 2.3), the output layer, norms and biases stay with fp32 moments, and so do tensors of fewer than 4,096 numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fledge.core.errors import FledgeError, Problem, need
from fledge.core.language import t
from fledge.training.settings import TrainSettings

SMALLEST = 4096  # numbers in a tensor whose moments are quantised


def adamw_8bit(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser for `groups` of parameters.

    Raises FledgeError where the library is missing, and where it cannot make a step on the parameters' device.
    """
    device = groups[0]["params"][0].device
    found = _why_not(device.type)
    if found:
        raise FledgeError(
            Problem(
                t("8-bit optimizers do not run on this device"),
                where="train.optimizer",
                found=f"{device.type}: {found}",
                fix=t("adafactor needs as little memory and runs everywhere"),
            )
        )
    library = need("bitsandbytes", "optim")
    made: torch.optim.Optimizer = library.optim.AdamW8bit(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, min_8bit_size=SMALLEST
    )
    return made


@cache
def _why_not(device: str) -> str:
    """What a step on a kind of device fails with; nothing when it succeeds. Asked by making one."""
    library = need("bitsandbytes", "optim")
    parameter = torch.nn.Parameter(torch.ones(SMALLEST, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        library.optim.AdamW8bit([parameter], lr=0.5, weight_decay=0.0, min_8bit_size=SMALLEST).step()
        moved = parameter.detach().mean().item()
    except Exception as error:  # every back end has errors of its own
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return (
        "" if abs(moved - 0.5) < 0.01 else t("a step led to {found} instead of {expected}", found=moved, expected=0.5)
    )
