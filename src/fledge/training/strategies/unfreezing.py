"""Progressive unfreezing: which parameters a step trains, as a pure function of the step.

At first the head, the last norm and the topmost layers are trained; every so many steps the layers below them join,
the embeddings last of all (with a tied head they are the head, and still come last). A parameter that waits has no
gradient: the optimiser does not touch it, decay it or count its steps, and the bias correction of its moments begins
when it joins.

In an undivided model a parameter that waits needs no gradient either, so that the backward pass ends above it; a
compiled layer is compiled again when it joins. Under a layout that divides the model (FSDP fixes at the start what
needs a gradient, a pipeline's stages expect one) the gradient is made and dropped: the same result, nothing saved.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fledge.training.strategies.depth import depths
from fledge.training.strategies.settings import Unfreeze


class Thaw:
    """Which of a run's parameters a step trains.

    `parameters` are those of the run that are here, named `model.layer`; `models` are the whole models, named as their
    parameters' names begin. Where they are divided (not `whole`), parameters that wait keep their gradients until those
    are dropped.
    """

    def __init__(
        self,
        settings: Unfreeze,
        models: Mapping[str, nn.Module],
        parameters: Mapping[str, Tensor],
        steps: int,
        whole: bool = True,
    ) -> None:
        self.layers, self.steps, self.parameters, self.whole = settings.layers, steps, parameters, whole
        self.every = max(1, round(settings.every * steps)) if settings.every < 1 else round(settings.every)
        placed = {f"{name}.{key}": below for name, model in models.items() for key, below in depths(model).items()}
        self.depths = {name: placed[name] for name in parameters}
        trained = {
            f"{name}.{key}" for name, model in models.items() for key, p in model.named_parameters() if p.requires_grad
        }  # of the whole models: every process of a pipeline comes to the same
        self.highest = min(placed[name] for name in trained)  # something is trained at all times

    def reach(self, step: int) -> int:
        """How far below the head the parameters trained in `step` (from 0) may stand."""
        return max(self.highest, self.layers * (1 + step // self.every))

    def trains(self, name: str, step: int) -> bool:
        """Whether `step` trains this parameter."""
        return self.depths[name] <= self.reach(step)

    @property
    def never(self) -> list[str]:
        """The parameters that the run ends without having trained."""
        return [name for name in self.parameters if not self.trains(name, self.steps - 1)]

    def begin(self, step: int) -> None:
        """Let the backward pass of `step` end where nothing below is trained."""
        for name, parameter in self.parameters.items() if self.whole else ():
            parameter.requires_grad_(self.trains(name, step))

    def drop(self, step: int) -> None:
        """Take away the gradients of those that wait."""
        for name, parameter in self.parameters.items():
            if not self.trains(name, step):
                parameter.grad = None

    def end(self) -> None:
        """Leave every parameter as it was before the run: to be trained."""
        for parameter in self.parameters.values() if self.whole else ():
            parameter.requires_grad_(True)
