"""A run as the report and the console see it: plain values, read from the store by whoever shows it. Light."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact
from fledge.core.events import Event


@dataclass(frozen=True)
class StageView:
    """One stage of a run: what it was asked, what it made, what it cost. Unknown values are empty."""

    name: str
    use: str
    status: str = ""  # waiting, running, made, cached, failed, interrupted
    seconds: float = 0.0
    fingerprint: str = ""
    path: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """config key → {"stage": "split.train", "fingerprint": …} or what stood there"""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """of a single output; with several outputs {output: metrics}"""
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """output name ("" when there is one) → {"kind", "path", …}"""
    config: Mapping[str, Any] = field(default_factory=dict)
    estimate: Mapping[str, Any] = field(default_factory=dict)
    """{"seconds": [low, high], "memory": [low, high]}"""
    peak_memory: float = 0.0
    execution: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config; where the view was made without it, the one that the artifact remembers."""
        if self.config or not self.path:
            return self.config
        return dict(Artifact(Path(self.path)).manifest.get("config", {}))

    @property
    def done(self) -> bool:
        """Whether its artifact is there."""
        return self.status in ("made", "cached")

    def folder(self, output: str = "") -> Path | None:
        """Where an output lies."""
        entry = self.outputs.get(output)
        if not self.path:
            return None
        return Path(self.path) / entry["path"] if isinstance(entry, Mapping) and entry.get("path") else Path(self.path)


@dataclass(frozen=True)
class RunView:
    """One run of a recipe."""

    name: str
    recipe_text: str = ""
    created: float = 0.0
    """seconds since 1970"""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """{"processor", "cores", "memory", …}"""
    stages: Sequence[StageView] = ()
    events: Sequence[Event] = ()
    command: str = ""
    """what makes the run again; `fledge run recipes/NAME.yaml` when empty"""

    def made_by(self, prefix: str) -> Iterator[StageView]:
        """The stages whose `use` starts with `prefix`, in order."""
        return (stage for stage in self.stages if stage.use.startswith(prefix))

    def stage(self, name: str) -> StageView | None:
        """The stage of that name."""
        return next((stage for stage in self.stages if stage.name == name.partition(".")[0]), None)

    def scores(self) -> list[dict[str, Any]]:
        """`scores.json` of every finished evaluation, in order."""
        found = []
        for stage in self.made_by("evaluate"):
            file = Path(stage.path) / "scores.json" if stage.path else None
            if file and file.is_file():
                found.append(json.loads(file.read_text(encoding="utf-8")))
        return found

    def items(self, task: str, model: str) -> list[dict[str, Any]]:
        """What one model answered to one task, item by item; empty when there is nothing."""
        for stage in self.made_by("evaluate"):
            file = Path(stage.path) / "items" / task / f"{model}.jsonl" if stage.path else None
            if file and file.is_file():
                return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
        return []
