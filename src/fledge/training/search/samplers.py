"""Which settings to try next: a pure function of the seed, the trial's number and what came out of those before it.

So a sweep that was killed goes on as if it had not been, and the same seed gives the same trials.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

from fledge.core.artifact import digest_of
from fledge.core.errors import need
from fledge.training.search.space import Choice, Dimension, Values, grid
from fledge.training.search.trial import Trial

Method: TypeAlias = Literal["random", "bayes", "grid"]
DRAWS = 200
"""How often to draw again what was tried before; then there is nothing new to be found."""


class Sampler(Protocol):
    """`suggest` says what trial `len(trials)` is to be; None when everything was tried."""

    def suggest(self, trials: Sequence[Trial]) -> Values | None: ...


class Random:
    """Every trial drawn by itself (Bergstra and Bengio, 2012); none twice."""

    def __init__(self, space: list[Dimension], seed: int) -> None:
        self.space, self.seed = space, seed

    def suggest(self, trials: Sequence[Trial]) -> Values | None:
        tried = [trial.values for trial in trials]
        for draw in range(DRAWS):
            values = {d.key: d.at(_share(self.seed, len(trials), draw, d.key)) for d in self.space}
            if values not in tried:
                return values
        return None


class Grid:
    """Every combination, in order."""

    def __init__(self, space: list[Dimension]) -> None:
        self.all = grid(space)

    def suggest(self, trials: Sequence[Trial]) -> Values | None:
        return self.all[len(trials)] if len(trials) < len(self.all) else None


class Bayes:
    """Tree-structured Parzen estimators (Bergstra et al., 2011) through optuna, after some random trials.

    The estimator is built anew for every trial from those that are finished; a pruned one counts with the last value
    that was seen of it.
    """

    def __init__(self, space: list[Dimension], seed: int, maximize: bool, first: int) -> None:
        self.space, self.seed, self.maximize, self.first = space, seed, maximize, first
        self.random = Random(space, seed)
        self.optuna: Any = need("optuna", "search")
        self.optuna.logging.set_verbosity(logging.WARNING)

    def suggest(self, trials: Sequence[Trial]) -> Values | None:
        if len(trials) < self.first:
            return self.random.suggest(trials)
        of = {dimension.key: self._distribution(dimension) for dimension in self.space}
        seed = int(digest_of([self.seed, "bayes", len(trials)])[:8], 16)
        study = self.optuna.create_study(
            direction="maximize" if self.maximize else "minimize",
            sampler=self.optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.first),
        )
        for trial in trials:
            if told := self._told(trial):
                study.add_trial(self.optuna.trial.create_trial(params=trial.values, distributions=of, **told))
        asked = study.ask(of).params
        values = {d.key: asked[d.key] if isinstance(d, Choice) else d.rounded(asked[d.key]) for d in self.space}
        return self.random.suggest(trials) if values in [trial.values for trial in trials] else values

    def _told(self, trial: Trial) -> dict[str, Any]:
        state = self.optuna.trial.TrialState
        if trial.state == "complete":
            return {"state": state.COMPLETE, "value": trial.value}
        if trial.state == "pruned" and trial.rungs:
            last = max(trial.rungs)
            return {"state": state.PRUNED, "intermediate_values": {round(1000 * last): trial.rungs[last]}}
        return {}

    def _distribution(self, dimension: Dimension) -> Any:
        distributions = self.optuna.distributions
        if isinstance(dimension, Choice):
            return distributions.CategoricalDistribution(dimension.values)
        if dimension.whole:
            return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def sampler(method: Method, space: list[Dimension], seed: int, maximize: bool, trials: int) -> Sampler:
    """The sampler of a method, for so many trials in all. Raises FledgeError where its library is missing."""
    if method == "grid":
        return Grid(space)
    if method == "random":
        return Random(space, seed)
    return Bayes(space, seed, maximize, first=max(3, min(10, trials // 4)))


def _share(*of: object) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return int(digest_of([str(item) for item in of])[:13], 16) / 16**13
