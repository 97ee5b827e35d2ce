"""One trial of a sweep, and the journal that outlives a crash: a line for every trial that has ended."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fledge.core.artifact import write_atomic
from fledge.training.search.space import Values

State: TypeAlias = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """What was tried and what came of it. `rungs`: the watched metric by the share of the training that was done."""

    number: int
    values: Values
    state: State
    value: float | None = None
    rungs: dict[float, float] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "rungs": {str(share): value for share, value in self.rungs.items()}}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Trial:
        """The inverse of `to_json`."""
        return cls(**{**row, "rungs": {float(share): value for share, value in row["rungs"].items()}})


class Journal:
    """`trials.jsonl`: what the sweep is, then its trials in order. A line that a crash cut short is left out."""

    def __init__(self, file: Path, header: dict[str, Any]) -> None:
        self.file = file
        self.trials: list[Trial] = []
        rows = list(_rows(file))
        if rows[:1] == [header]:
            self.trials = [Trial.from_json(row) for row in rows[1:]]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in (header, *(t.to_json() for t in self.trials))]
        write_atomic(file, "".join(lines))

    def add(self, trial: Trial) -> None:
        """Write a trial down for good."""
        self.trials.append(trial)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(trial.to_json(), ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _rows(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
