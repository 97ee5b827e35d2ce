"""What keeps a run sound: steps that are left out, and the way back when it has gone astray.

A step whose loss or gradient is not finite is left out, and so, if the recipe asks for it, is one that jumps out of
the recent ones. After `BAD_STEPS` of them in a row the run returns to an earlier checkpoint and goes on with batches
that it has not seen; after `rollbacks` returns it gives up. All of this follows from the steps alone: a run that is
killed and resumed takes the same way.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.training.settings import TrainSettings

NOT_FINITE, SPIKE = "not finite", "spike"
BAD_STEPS = 5
"""So many steps left out in a row, and the run has gone astray."""
WINDOW = 128  # steps among which a jump is looked for, as in OLMo (OLMo et al., 2025, section 3.2)
ENOUGH = 32  # fewer say nothing


class Stability:
    """The judge of each step, and what a checkpoint must know of it."""

    def __init__(self, settings: TrainSettings, state: Mapping[str, Any]) -> None:
        self.sigmas, self.rollbacks_allowed = settings.spike_sigmas, settings.rollbacks
        self.losses: deque[float] = deque(state.get("losses", ()), maxlen=WINDOW)
        self.norms: deque[float] = deque(state.get("norms", ()), maxlen=WINDOW)
        self.skipped, self.bad = int(state.get("skipped", 0)), int(state.get("bad", 0))
        self.shift = int(state.get("shift", 0))
        """how many batches further the data is than the steps"""
        self.rollbacks, self.returned_to = int(state.get("rollbacks", 0)), int(state.get("returned_to", -1))

    def judge(self, loss: float, norm: float) -> str:
        """Why the step must be left out: "not finite", "spike", or "" for a sound one."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return NOT_FINITE
        if self.sigmas and (_jumps(loss, self.losses, self.sigmas) or _jumps(norm, self.norms, self.sigmas)):
            return SPIKE
        return ""

    def made(self, loss: float, norm: float) -> None:
        """The step was sound and has been made."""
        self.bad = 0
        self.losses.append(loss)
        self.norms.append(norm)

    def left_out(self) -> None:
        """The step was left out."""
        self.skipped, self.bad = self.skipped + 1, self.bad + 1

    @property
    def astray(self) -> bool:
        """Whether too many steps in a row were left out."""
        return self.bad >= BAD_STEPS

    def returned(self, step: int, target: int, state: Mapping[str, Any]) -> None:
        """The run is back where it was after `target` steps, with the `state` of then, coming from `step`.

        Data goes on behind what has been seen.
        """
        self.losses = deque(state.get("losses", ()), maxlen=WINDOW)
        self.norms = deque(state.get("norms", ()), maxlen=WINDOW)
        self.bad = 0
        self.shift += step - target
        self.rollbacks, self.returned_to = self.rollbacks + 1, target

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "losses": list(self.losses), "norms": list(self.norms), "skipped": self.skipped, "bad": self.bad,
            "shift": self.shift, "rollbacks": self.rollbacks, "returned_to": self.returned_to,
        }  # fmt: skip


def require_finite(parameters: Mapping[str, Tensor]) -> None:
    """Raise FledgeError where a weight to start from is not finite: no step could be made from there."""
    broken = [name for name, parameter in parameters.items() if not torch.isfinite(_mine(parameter)).all()]
    if broken:
        raise FledgeError(
            Problem(
                t("the weights to start from are not all finite"),
                found=t("{count} of {total} parameters: {names}", count=len(broken), total=len(parameters),
                        names=listing(broken, 4)),
                fix=t("start from another checkpoint or model; one that was trained in fp16 may have overflowed"),
            )
        )  # fmt: skip


def _mine(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that is divided among several."""
    return parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter.detach()


def _jumps(value: float, recent: deque[float], sigmas: float) -> bool:
    """Whether a value lies so many standard deviations above the recent ones."""
    if len(recent) < ENOUGH:
        return False
    mean = statistics.fmean(recent)
    return value > mean + sigmas * max(statistics.pstdev(recent, mean), 1e-3 * abs(mean))
