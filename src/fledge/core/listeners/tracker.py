"""What the programs that keep and compare runs have in common: one run a stage, every step once.

A run in such a program stands for one making of one artifact. A stage that was killed and goes on (its `attempt`
grows) goes on in the same run, and the steps that it makes again since its checkpoint are not told a second time: for
every curve the last step told is kept in `told.json` beside the program's own files. A stage that is made anew
(attempt 0) is a new run. What a run returned to after it had gone astray is told once, too; the last word on every
step stands in `events.jsonl` and in the report.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fledge.core.artifact import MANIFEST, write_atomic
from fledge.core.events import Event

_ENDS = {"made": "finished", "failed": "failed", "interrupted": "stopped"}


@dataclass(frozen=True)
class Told:
    """What a program is told about a stage when its run begins: who it is, and its settings by flat names."""

    stage: str
    use: str
    recipe: str
    fingerprint: str
    seed: int
    parameters: Mapping[str, Any]
    artifact: Path
    """where what it makes will lie"""

    @property
    def tags(self) -> dict[str, str]:
        """What a run is found by."""
        return {
            "fledge.recipe": self.recipe, "fledge.stage": self.stage, "fledge.use": self.use,
            "fledge.fingerprint": self.fingerprint, "fledge.seed": str(self.seed),
            "fledge.artifact": self.artifact.as_uri(),
        }  # fmt: skip


class Tracker(ABC):
    """A listener that keeps the curves of every stage that has some. The program is imported with the first point."""

    modules: ClassVar[tuple[str, ...]] = ()
    """what must be importable"""

    def __init__(self, stages: Mapping[str, Told], folder: Path) -> None:
        self.stages, self.folder = stages, folder
        self.trouble = ""
        """why the program stopped listening, where it did: a run never fails for that"""
        self._open: dict[str, Any] = {}  # by stage
        self._waiting: dict[str, tuple[int, float, dict[str, float]]] = {}  # step, time, values of one step
        self._book = folder / "told.json"
        self._known: dict[str, dict[str, Any]] = (
            json.loads(self._book.read_text(encoding="utf-8")) if self._book.exists() else {}
        )

    def hear(self, event: Event) -> None:
        """Gather what belongs to one step, and hand it over when the next one begins or the stage ends."""
        if event.stage in self.stages and not self.trouble:
            with self._survive():
                self._hear(event)

    def close(self) -> None:
        """End what is still open."""
        for stage in list(self._open):
            with self._survive():
                self._finish(stage, "stopped", "")

    @contextmanager
    def _survive(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}".splitlines()[0][:300]

    def _hear(self, event: Event) -> None:
        if event.kind == "metric" and event.step is not None:
            step, _, values = self._waiting.get(event.stage, (event.step, 0.0, {}))
            if step != event.step:
                self._flush(event.stage)
                values = {}
            if self._is_new(event):
                values[event.name] = float(event.value)
            self._waiting[event.stage] = (event.step, event.time, values)
        elif event.kind == "stage" and event.name in _ENDS:
            self._finish(event.stage, _ENDS[event.name], str(event.data.get("path", "")))

    # --- what a program does -----------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, told: Told, identity: str) -> tuple[Any, str]:
        """A new run, or with an `identity` that run again; and the run's identity."""

    @abstractmethod
    def points(self, run: Any, step: int, values: Mapping[str, float], when: float) -> None:
        """The values of one step, `when` in seconds since 1970."""

    @abstractmethod
    def end(self, run: Any, status: str, step: int, metrics: Mapping[str, float], artifact: Path | None) -> None:
        """The run ended after `step`: "finished", "failed" or "stopped". The artifact is linked, never copied."""

    # --- what is told once -------------------------------------------------------------------------------------------

    def _is_new(self, event: Event) -> bool:
        """Whether this step of this curve was not told yet; opens the run."""
        fingerprint = self.stages[event.stage].fingerprint
        if event.stage not in self._open:
            if not event.attempt:
                self._known.pop(fingerprint, None)
            known = self._known.get(fingerprint, {"id": "", "last": {}})
            run, identity = self.begin(self.stages[event.stage], known["id"])
            self._open[event.stage] = run
            self._known[fingerprint] = {"id": identity, "last": known["last"]}
        assert event.step is not None
        return event.step > int(self._known[fingerprint]["last"].get(event.name, -1))

    def _flush(self, stage: str) -> None:
        step, when, values = self._waiting.pop(stage, (0, 0.0, {}))
        if values:
            self.points(self._open[stage], step, values, when)
            self._known[self.stages[stage].fingerprint]["last"].update(dict.fromkeys(values, step))
            write_atomic(self._book, json.dumps(self._known, indent=1, sort_keys=True) + "\n")

    def _finish(self, stage: str, status: str, path: str) -> None:
        self._flush(stage)
        run = self._open.pop(stage, None)
        if run is not None:
            artifact = Path(path) if path else None
            last = max(self._known[self.stages[stage].fingerprint]["last"].values(), default=0)
            self.end(run, status, last, _numbers(artifact) if artifact else {}, artifact)


def _numbers(artifact: Path) -> dict[str, float]:
    """The finite numbers among an artifact's metrics, as `final.NAME`; those of a part with its name before them."""
    manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    return {
        f"final.{part}.{name}" if part else f"final.{name}": float(value)
        for part, output in manifest["outputs"].items()
        for name, value in output["metrics"].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
