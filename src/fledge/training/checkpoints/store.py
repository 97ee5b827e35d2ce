"""The checkpoints of a run: whole or not there, checked by SHA-256 when read, the old ones removed.

    step-00000200/  shard-00000.safetensors  shard-00001.safetensors …  checkpoint.json
    best-00000150/  the weights that were best on held-out rows, in the same form

`checkpoint.json` holds the step, the trainer's counters, the table of contents, the digest of every file and its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fledge.core.artifact import digest_of
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.training.checkpoints.place import place_of
from fledge.training.checkpoints.shards import Contents, Divider, Reading, Shards, file_name, write
from fledge.training.checkpoints.state import RunState
from fledge.training.checkpoints.writer import Snapshot, Writer

FORMAT = 2
ANCHORS_KEPT = 2
_NAME = re.compile(r"(step|best)-(\d{8,})")


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back: steps done, the trainer's counters, and the damaged ones that were passed over."""

    step: int
    state: Mapping[str, Any]
    damaged: tuple[str, ...] = ()


class Groups:
    """Two ways for all processes to speak to each other: one for the thread that trains, one for that which writes."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        several = world > 1 and dist.get_backend() != "fake"
        self.training = dist.new_group(backend="gloo") if several else None
        self.writing = dist.new_group(backend="gloo") if several else None

    def largest(self, *values: float) -> list[float]:
        """The largest of every process's value, for each of `values`."""
        if self.training is None:
            return list(values)
        table = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(table, dist.ReduceOp.MAX, group=self.training)
        return [float(value) for value in table]

    def of_the_first(self, value: int) -> int:
        """The first process's value."""
        return int(self.largest(value if self.rank == 0 else float("-inf"))[0])

    def gather(self, mine: Any) -> list[Any]:
        """Everybody's value, in the thread that writes."""
        if self.writing is None:
            return [mine]
        found = [None] * self.world
        dist.all_gather_object(found, mine, group=self.writing)
        return found


class Checkpoints:
    """The checkpoints of one training run, at one place. Every process calls every method, with its own tensors."""

    def __init__(self, where: str | Path, groups: Groups | None = None, keep_last: int = 2) -> None:
        self.where, self.place = where, place_of(where)
        self.groups, self.keep_last = groups or Groups(), keep_last
        self.writer = Writer(self.groups.writing)
        self._divider = Divider(self.groups.rank, self.groups.training)
        self._best: dict[int, int] = {}  # of the steps written here: which one was best then

    # --- writing -----------------------------------------------------------------------------------------------------

    def save(self, step: int, run: RunState, state: Mapping[str, Any], anchor_every: int = 0) -> None:
        """Write the checkpoint after `step` steps in the background; older ones but for the last few then go.

        The last two anchors stay too: those at multiples of `anchor_every` steps.
        """
        self._best[step] = int(state.get("best_step", 0))
        self._start("step", step, self._divider.divide("state", run.tensors()), state, anchor_every)

    def save_best(self, step: int, run: RunState) -> None:
        """Write the weights after `step` steps, the best so far, in the background."""
        self._start("best", step, self._divider.divide("weights", run.weights()), {}, 0)

    def _start(self, kind: str, step: int, shards: Shards, state: Mapping[str, Any], anchor_every: int) -> None:
        name, state = f"{kind}-{step:08d}", json.loads(json.dumps(state))  # as it is now

        def run(snapshot: Snapshot) -> None:
            digest: str | BaseException
            try:
                digest = write(self.place, name, shards, snapshot)
            except BaseException as error:
                digest = error
                snapshot.forget()
            self._commit(name, {"step": step, "state": state}, shards, self.groups.gather(digest))
            if self.groups.rank == 0 and kind == "step":
                self._remove_old(anchor_every)

        self.writer.start(shards.tensors, run)

    def _commit(self, name: str, about: dict[str, Any], shards: Shards, digests: list[Any]) -> None:
        for error in digests:
            if isinstance(error, BaseException):
                raise error
        if self.groups.rank == 0:
            manifest = {
                "format": FORMAT, **about, "processes": self.groups.world,
                "sha256": {file_name(rank): digest for rank, digest in enumerate(digests)},
                "tensors": shards.table,
            }  # fmt: skip
            self.place.commit(name, json.dumps({**manifest, "digest": digest_of(manifest)}))
        if self.groups.writing is not None:
            dist.barrier(group=self.groups.writing)  # whoever goes on knows that it is there

    def _remove_old(self, anchor_every: int) -> None:
        steps = self.steps()
        anchors = [step for step in steps if anchor_every and step % anchor_every == 0]
        kept = {*steps[: self.keep_last], *anchors[:ANCHORS_KEPT]}
        for step in set(steps) - kept:
            self.place.remove(f"step-{step:08d}")
        needed = {self._best_of(step) for step in kept}
        for step in self._all("best"):
            if step < max(kept) and step not in needed:
                self.place.remove(f"best-{step:08d}")

    def _best_of(self, step: int) -> int:
        if step not in self._best:
            manifest = self._manifest(f"step-{step:08d}")
            self._best[step] = int(manifest["state"].get("best_step", 0)) if manifest else 0
        return self._best[step]

    def forget_after(self, step: int) -> None:
        """Remove what was written after `step` steps: a run that returned there has taken another way."""
        if self.groups.rank == 0:
            for newer in (s for s in self.steps() if s > step):
                self.place.remove(f"step-{newer:08d}")

    # --- reading -----------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest first."""
        return self._all("step")

    def _all(self, kind: str) -> list[int]:
        found = (_NAME.fullmatch(name) for name in self.place.names())
        return sorted((int(match[2]) for match in found if match and match[1] == kind), reverse=True)

    def restore(self, run: RunState, latest: int | None = None, anchor_every: int = 0) -> Restored | None:
        """Load the newest whole checkpoint into the run; None when there is none.

        With `latest` only an anchor after at most so many steps will do. How the run was divided among processes when
        the checkpoint was written does not matter.
        """
        self.writer.wait()
        damaged: list[str] = []
        candidates = self.steps() if self.groups.rank == 0 else []
        if latest is not None:
            candidates = [s for s in candidates if s <= latest and anchor_every and s % anchor_every == 0]
        for step in self._agreed(candidates):
            name = f"step-{step:08d}"
            manifest = self._whole(name)
            if manifest is None:
                damaged.append(name)
                continue
            run.prepare()
            tensors = run.wanted(manifest["tensors"])
            self._fill(name, manifest, tensors)
            run.take_numbers(tensors)
            return Restored(manifest["step"], manifest["state"], tuple(damaged))
        return Restored(0, {}, tuple(damaged)) if damaged else None

    def restore_best(self, step: int, run: RunState) -> bool:
        """Load the best weights, those after `step` steps; whether they were there and whole."""
        self.writer.wait()
        name = f"best-{step:08d}"
        manifest = self._whole(name)
        if manifest is None:
            return False
        self._fill(name, manifest, run.weights())
        return True

    def tidy(self) -> None:
        """Remove what a killed process left half-written."""
        if self.groups.rank == 0:
            self.place.tidy()

    def _agreed(self, candidates: list[int]) -> Iterator[int]:
        """The first process's candidates, to all processes, one by one."""
        for index in range(self.groups.of_the_first(len(candidates))):
            yield self.groups.of_the_first(candidates[index] if self.groups.rank == 0 else 0)

    def _whole(self, name: str) -> dict[str, Any] | None:
        """The manifest of a whole checkpoint, or None when a file is missing, cut short or changed.

        Every process reads a share of the files.
        """
        manifest = self._manifest(name)
        ok = manifest is not None
        if manifest is not None:
            files = sorted(manifest["sha256"].items())[self.groups.rank :: self.groups.world]
            try:
                ok = all(self.place.digest(name, file) == digest for file, digest in files)
            except OSError:
                ok = False
        return manifest if self.groups.largest(not ok) == [0] else None

    def _manifest(self, name: str) -> dict[str, Any] | None:
        try:
            manifest: dict[str, Any] = json.loads(self.place.manifest(name))
            digest = manifest.pop("digest")
            return manifest if manifest["format"] == FORMAT and digest_of(manifest) == digest else None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def _fill(self, name: str, manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Read the tensors. Raises FledgeError, with nothing changed, where the checkpoint is not one of such a run."""
        reading: Reading | None = None
        found = ""
        try:
            reading = Contents(self.place, name, manifest["tensors"]).plan(tensors)
        except ValueError as error:
            found = str(error)
        if self.groups.largest(reading is None) != [0] or reading is None:
            raise FledgeError(
                Problem(
                    t("the checkpoint is one of another model"),
                    where=f"{self.where}/{name}",
                    found=found,
                    fix=t("remove it, or keep the checkpoints of this run elsewhere"),
                )
            )
        with torch.no_grad():
            reading.fill()
