"""What a task is: rows read once, asked of every model in turn, and a conclusion drawn from the answers of all.

`ask` returns *items*, plain JSON rows with everything a number is made of (log-probabilities, texts), which are kept
beside the scores; `conclude` is a pure function of the items. So every number can be checked by hand, two models can
be compared item by item, and a killed evaluation goes on where it was.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fledge.core.intervals import Interval
from fledge.core.job import Job
from fledge.core.reference import Ref
from fledge.core.stage import Config

if TYPE_CHECKING:
    from fledge.evaluation.subject import Subject

Item = dict[str, Any]
Number = Interval | float
Tell = Callable[[int], None]
"""Hears how many more rows are done."""


@dataclass(frozen=True)
class Paired:
    """What two models are compared on: for every model a value per item (in the same order), and weights.

    `proportion` values are 0, ½ or 1; others are sums to be divided by the sum of the weights.
    """

    metric: str
    values: Mapping[str, Sequence[float]]
    weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    proportion: bool = True


@dataclass(frozen=True)
class Conclusion:
    """The numbers of a task: by model, and of the baselines that stand beside them (chance, xz, the longer answer)."""

    models: Mapping[str, Mapping[str, Number]]
    baselines: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    paired: Sequence[Paired] = ()


class Task(Config):
    """Base of the tasks."""

    label: str = Field(
        "", pattern=r"^[A-Za-z0-9_-]*$", description="name in tables and metrics, when it is not the task's own"
    )

    @property
    def key(self) -> str:
        """What the task is called in metrics and file names."""
        return self.label or str(self.task)  # type: ignore[attr-defined]

    def wants(self) -> Mapping[str, Ref[Any]]:
        """Models beside the examined ones that must answer too: {"reference": …, "reward": …}."""
        return {}

    @abstractmethod
    def load(self, job: Job) -> Any:
        """Read the rows that every model is asked. They stay in memory during the stage."""

    def count(self, rows: Any) -> int:
        """How many rows `ask` tells of."""
        return len(rows)

    def tokens(self) -> float:
        """About how many tokens one model reads for it; one that it writes costs as much as twenty that it reads."""
        return 50_000

    @abstractmethod
    def ask(self, rows: Any, subject: Subject, seed: int, tell: Tell) -> list[Item]:
        """Put the rows to one model."""

    @abstractmethod
    def conclude(self, rows: Any, answers: Mapping[str, list[Item]], roles: Mapping[str, str], seed: int) -> Conclusion:
        """The numbers, from the items of every model. `roles` says which name plays a part of `wants`."""
