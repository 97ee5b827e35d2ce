"""Dynamic loss scaling for fp16 (Micikevicius et al., 2018, section 3.2): small gradients are kept from becoming zero.

The loss is multiplied by a power of two before the backward pass, and the gradients are divided by it afterwards.
Where they overflow, the step is left out and the scale halved; after `GROW_AFTER` whole steps it is doubled. The
scale depends on the steps alone and is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FIRST = 2.0**16
SMALLEST = 1.0  # an overflow below it is a divergence, not a matter of the format
GROW_AFTER = 2_000


class LossScale:
    """The scale of a run: 1 for ever where the format is not fp16."""

    def __init__(self, dtype: str, value: float | None = None, whole_steps: int = 0) -> None:
        self.dynamic = dtype == "float16"
        self.value = value or (FIRST if self.dynamic else 1.0)
        self.whole_steps = whole_steps

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale, in place."""
        found = list(gradients)
        if self.value != 1 and found:
            torch._foreach_mul_(found, 1 / self.value)

    def update(self, finite: bool) -> bool:
        """Adapt after a step; whether an overflow of this step is the format's doing, so that the run is sound."""
        if not self.dynamic:
            return False
        if not finite:
            excused = self.value > SMALLEST
            self.value, self.whole_steps = max(SMALLEST, self.value / 2), 0
            return excused
        self.whole_steps += 1
        if self.whole_steps >= GROW_AFTER:
            self.value, self.whole_steps = self.value * 2, 0
        return False

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"loss_scale": self.value, "whole_steps": self.whole_steps}
