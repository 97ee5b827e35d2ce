"""What a stage is given when it runs: where to write, what it depends on, and whom to tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from fledge.core.artifact import Artifact, digest_of
from fledge.core.events import Emitter
from fledge.core.reference import FirstOf, Outside, Ref, Source, fetch
from fledge.core.stage import Execution

A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class Job:
    """One attempt at one stage.

    `out` is empty at the start of every attempt and becomes the artifact; `work` survives a crash and holds
    checkpoints and finished shards. With several processes every rank gets the same Job but for `rank`;
    rank 0 alone writes below `out`.
    """

    name: str
    out: Path
    work: Path
    seed: int
    execution: Execution
    events: Emitter
    inputs: Mapping[str, Artifact] = field(default_factory=dict)  # by reference text
    outside: Mapping[str, Outside] = field(default_factory=dict)  # by source text
    attempt: int = 0
    rank: int = 0
    world: int = 1

    def open(self, ref: Ref[A]) -> A:
        """The artifact behind a reference (a raw file or folder where the user named one)."""
        return cast(A, self.inputs[ref.text])

    def find(self, source: Source | FirstOf) -> Outside:
        """Where a source's bytes lie; of several, the first that is there."""
        texts = [source.text] if isinstance(source, Source) else [s.text for s in source]
        return self._fetched(next(self.outside[text] for text in texts if text in self.outside))

    def files_of(self, text: str) -> list[Path]:
        """The files and folders behind the text of a reference or a source, for code that knows no artifacts."""
        if text not in self.outside:
            return [self.inputs[text].path]
        found = self._fetched(self.outside[text])  # of a package its own files, not the folder of all packages
        whole = found.path.is_file() or (found.scheme == "path" and found.path.exists())
        return [found.path] if whole else [found.path / f for f in found.files]

    def _fetched(self, found: Outside) -> Outside:
        """The same on this machine: what is behind a URL is fetched into the work folder."""
        return fetch(found, self.work / "fetched" / found.digest[:16]) if found.scheme == "url" else found

    @property
    def checkpoints(self) -> Path | str:
        """Where a training keeps what survives a crash: a folder, or a URL that ends with this stage's fingerprint."""
        if not self.execution.checkpoints:
            return self.work / "checkpoints"
        parts = self.work.parts  # of unfinished stages: a fingerprint, and below it where a stage runs others inside
        below = parts[len(parts) - parts[::-1].index("work") :] if "work" in parts[:-1] else parts[-1:]
        return "/".join([self.execution.checkpoints.rstrip("/"), *below])

    def rng_seed(self, *purpose: Any) -> int:
        """A 60-bit seed that depends on the run's seed and `purpose`, on nothing else."""
        return int(digest_of([self.seed, *map(str, purpose)])[:15], 16)
