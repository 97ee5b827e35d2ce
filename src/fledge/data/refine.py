"""The refinery: a list of steps over records. What a step refuses is kept, with the step, the reason and the value.

The steps are cut into passes at those that compare rows with each other (duplicates): every pass goes over the corpus
chunk by chunk, in as many processes as there are, on this machine or on a Ray cluster (`data.passes`); between two
passes one decision is made over the sketches of all chunks. Nothing here depends on how many processes work, on the
order in which they finish, or on how often they were killed: chunks are numbered by the corpus alone.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact, digest_of
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref, Source
from fledge.core.stage import walk
from fledge.core.workers import same_workers, spread, workers_for
from fledge.data.dedup.index import find_index, has_index, write_index
from fledge.data.inputs import Rows, rows_of, set_aside
from fledge.data.passes import ROWS, SKETCH, Pass, Piece, make, write_table
from fledge.data.steps import CorpusStep, Step, write_step
from fledge.data.steps.base import Sketches
from fledge.records.shards import RECORDS, ShardWriter

Notes = list[dict[str, Any]]
SHARD_ROWS = 20_000


class Refinery:
    """One run of a list of steps for a job, from the start or from where the last attempt ended."""

    def __init__(self, job: Job, kind: str, steps: Sequence[Step], keep_index: bool = False) -> None:
        self.job, self.kind, self.steps, self.work, self.keep_index = job, kind, steps, job.work, keep_index
        named = {leaf.text for step in steps for _, leaf in walk(step) if isinstance(leaf, (Ref, Source))}
        self.found = {text: job.files_of(text) for text in named}

    def run(self, data: Artifact, against: Sequence[Artifact] = ()) -> dict[str, Any]:
        """Write the records of `data` that passed below `job.out`, the others to `rejected` there, and with
        `keep_index` what the corpus steps compared to `index`.

        What corpora in `against` hold is a duplicate here. Returns the metrics.
        """
        started = time.perf_counter()
        with same_workers():
            rows, folders, notes = self._passes(data, against)
        with ThreadPoolExecutor(1) as beside:
            refused = beside.submit(set_aside, folders, self.job.out)
            self._write_shards(rows)
        return self._metrics(notes, refused.result(), time.perf_counter() - started)

    def _passes(self, data: Artifact, against: Sequence[Artifact]) -> tuple[list[Rows], list[Path], list[Notes]]:
        """What passed, the folders that hold what did not, and what was noted in each pass."""
        unreadable = self.work / "raw"
        rows = self._rows_of(data, unreadable)
        folders: list[list[Path]] = []
        notes: list[Notes] = []
        groups = cut(self.steps)
        after: CorpusStep | None = None
        for number, (steps, before) in enumerate(groups):
            folder = self.work / f"{number:02d}"
            verdicts = self.work / f"{number:02d}-verdicts.arrow"
            if after is not None:
                self._decide(after, verdicts, folders[-1], notes[-1], against)
                if self.keep_index:
                    self._write_index(number - 1, after, verdicts, folders[-1], notes[-1])
            last = number == len(groups) - 1
            keep = last or after is not None or bool(steps)
            todo = Pass(self.kind, tuple(steps), after, verdicts, before, keep, self.found)
            made, said = self._go_over(todo, rows, folder, (number, len(groups)))
            if keep:
                if number > 0:
                    _forget_rows(rows)
                rows = [Rows(part / ROWS, -1, note["rows"]) for part, note in zip(made, said, strict=True)]
            folders.append(made)
            notes.append(said)
            after = before
        return rows, [unreadable, *(part for made in folders for part in made)], notes

    def _write_shards(self, rows: list[Rows]) -> None:
        """The rows as shards below `job.out`, several at once: threads suffice where Arrow compresses."""
        shards = _shards(rows)
        (self.job.out / RECORDS).mkdir()

        def write(number: int) -> None:
            making = self.job.out / f".shard-{number:05d}"
            with ShardWriter(making, self.kind, SHARD_ROWS) as writer:
                for part, start, end in shards[number]:
                    writer.write_table(part.read(self.kind).slice(start, end - start))
            next((making / RECORDS).iterdir()).rename(self.job.out / RECORDS / f"part-{number:05d}.parquet")
            shutil.rmtree(making)

        with ThreadPoolExecutor(workers_for(self.job.execution, len(shards))) as pool:
            list(pool.map(write, range(len(shards))))

    def _rows_of(self, data: Artifact, raw: Path) -> list[Rows]:
        return rows_of(data, raw, self.job.events.progress, self.kind)[1]

    def _go_over(self, todo: Pass, rows: list[Rows], folder: Path, at: tuple[int, int]) -> tuple[list[Path], Notes]:
        """Make every chunk of a pass. Returns their folders and what was noted, in the order of the corpus."""
        description = todo.to_json()
        parts, first = [folder / f"{number:06d}" for number in range(len(rows))], 0
        pieces = []
        for part, chunk in zip(parts, rows, strict=True):
            pieces.append(Piece(description, chunk, first, part))
            first += chunk.count
        done, (number, passes) = 0, at
        for note in spread(make, pieces, self.job.execution):
            done += note["rows_in"]
            self.job.events.progress((number * first + done) / passes, first)
        return parts, [make(piece) for piece in pieces]  # all are there: read in order

    def _decide(
        self, step: CorpusStep, file: Path, parts: list[Path], notes: Notes, against: Sequence[Artifact]
    ) -> None:
        """The verdicts of a corpus step, unless an earlier attempt has made them."""
        if file.is_file():
            return
        scratch = file.with_suffix(".scratch")
        earlier = [self.sketched(step, artifact, scratch) for artifact in against]
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        verdicts = step.decide(_sketches(parts, [note["rows"] for note in notes], scratch), earlier)
        making = file.with_name(f".{file.name}")
        write_table(verdicts, making, compression=None)  # it is read as a memory map
        making.replace(file)
        shutil.rmtree(scratch)

    def _write_index(self, number: int, step: CorpusStep, file: Path, parts: list[Path], notes: Notes) -> None:
        import pyarrow as pa
        import pyarrow.ipc as ipc

        sketches = _sketches(parts, [note["rows"] for note in notes], file.with_suffix(".scratch"))
        with pa.memory_map(str(file)) as source:
            verdicts = ipc.open_file(source).read_all()
            write_index(self.job.out, number, step, write_step(step), self.kind, sketches, verdicts)

    def sketched(self, step: CorpusStep, artifact: Artifact, scratch: Path) -> Sketches:
        """The sketches of a corpus that came before: its index, or what is read of it now."""
        if has_index(artifact):
            if found := find_index(artifact, write_step(step), self.kind, scratch):
                return found
            self.job.events.message(
                t("the index of {path} was made with other options of {step}: it is read again",
                  path=artifact.path, step=step.name)
            )  # fmt: skip
        name = digest_of([str(artifact.path), write_step(step)])[:12]
        rows = self._rows_of(artifact, self.work / f"raw-{name}")
        todo = Pass(self.kind, before=step, keep_rows=False, found=self.found)
        parts, notes = self._go_over(todo, rows, self.work / f"against-{name}", (0, 1))
        return _sketches(parts, [note["rows"] for note in notes], scratch)

    def _metrics(self, notes: list[Notes], refused: dict[str, dict[str, int]], seconds: float) -> dict[str, Any]:
        counts, spent = Counter[str](), Counter[str]()
        for note in (note for said in notes for note in said):
            counts.update(note["counts"])
            spent.update(note["seconds"])
        rows, size = Counter[str](), Counter[str]()
        for note in notes[-1]:
            rows.update(note["rows_by_language"])
            size.update(note["bytes_by_language"])
        bytes_in = sum(note["bytes_in"] for note in notes[0])
        return {
            "rows_in": sum(note["rows_in"] for note in notes[0]), "rows_out": rows.total(),
            "bytes_in": bytes_in, "bytes_out": size.total(),
            "rows_by_language": dict(sorted(rows.items())), "bytes_by_language": dict(sorted(size.items())),
            "rejected": refused,
            "pii": {key.removeprefix("pii/"): n for key, n in sorted(counts.items()) if n and key.startswith("pii/")},
            "notes": {key: n for key, n in sorted(counts.items()) if n and not key.startswith("pii/")},
            "seconds_by_step": {step.name: round(spent[step.name], 2) for step in self.steps},
            "bytes_per_second": round(bytes_in / max(seconds, 1e-9)),
        }  # fmt: skip


def cut(steps: Sequence[Step]) -> list[tuple[list[Step], CorpusStep | None]]:
    """The passes: the steps of each that look at one chunk, and the corpus step that ends it (None at the end)."""
    passes: list[tuple[list[Step], CorpusStep | None]] = []
    group: list[Step] = []
    for step in steps:
        if isinstance(step, CorpusStep):
            passes.append((group, step))
            group = []
        else:
            group.append(step)
    return [*passes, (group, None)]


def _shards(rows: list[Rows]) -> list[list[tuple[Rows, int, int]]]:
    """Which rows of which chunks (from, to) each shard of the output holds; one shard where there are none."""
    shards: list[list[tuple[Rows, int, int]]] = [[]]
    room = SHARD_ROWS
    for part in rows:
        start = 0
        while start < part.count:
            if not room:
                shards.append([])
                room = SHARD_ROWS
            end = min(part.count, start + room)
            shards[-1].append((part, start, end))
            room -= end - start
            start = end
    return shards


def _sketches(parts: list[Path], sizes: list[int], scratch: Path) -> Sketches:
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return Sketches([part / SKETCH for part in parts], starts, sum(sizes), scratch)


def _forget_rows(rows: list[Rows]) -> None:
    """What the next pass has taken over is not needed a second time."""
    for part in rows:
        if part.group < 0:
            part.file.unlink(missing_ok=True)
