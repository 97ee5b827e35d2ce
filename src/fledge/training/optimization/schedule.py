"""Learning-rate schedules: a pure function of the step, safe at both ends."""

from __future__ import annotations

import math

from fledge.training.settings import TrainSettings

DECAY_SHARE = 0.2  # of all steps, for warm-up–stable–decay (Hu et al., 2024)


def warmup_steps(settings: TrainSettings, total: int) -> int:
    """Steps of warm-up: a share of `total` below 1, else a number; never more than there are."""
    return min(total, round(settings.warmup * total) if settings.warmup < 1 else round(settings.warmup))


def lr_factor(step: int, total: int, settings: TrainSettings) -> float:
    """The share of the peak learning rate at `step` (from 0) of `total`.

    The first step is never zero (it would be lost), past the end nothing rises, and nothing falls below
    `min_lr_ratio`, where all end but `constant`, `inverse_sqrt` and `ramp`, which begins there.
    """
    warmup = warmup_steps(settings, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step + 1 - warmup) / max(1, total - warmup))
    floor = settings.min_lr_ratio
    match settings.schedule:
        case "constant":
            return 1.0
        case "linear":
            return floor + (1 - floor) * (1 - progress)
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "ramp":  # Smith, 2017, section 3.3, with equal steps in the logarithm
            return float(floor ** (1 - progress)) if floor else progress
        case "inverse_sqrt":  # Vaswani et al., 2017, section 5.3
            return max(floor, math.sqrt(max(1, warmup) / (step + 1)))
        case "wsd":
            left = (total - step - 1) / max(1.0, DECAY_SHARE * total)
            return floor + (1 - floor) * min(1.0, max(0.0, left))
