"""The refinery: a list of steps over records. What a step refuses is kept, with the step, the reason and the value.

Steps that look at one record at a time run chunk by chunk; each finished chunk is a folder below `work`, so that a
refinery that was killed goes on behind the last one. Steps that compare records with each other (duplicates) hold
them in memory while they decide: about ten bytes for each byte of text.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact
from fledge.data.steps import CorpusStep, Rejected, Step
from fledge.data.texts import size_of
from fledge.records.kinds import Record, to_row
from fledge.records.rejects import Rejects
from fledge.records.shards import ShardWriter, count, read, shards_of

CHUNK = 2_000  # records: a few seconds of work
_DONE = "chunk.json"
Progress = Callable[[float, float | None], None]


@dataclass
class Tally:
    """What was counted on the way: sizes, what the steps noted, the seconds each took in this attempt."""

    rows_in: int = 0
    bytes_in: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class Refinery:
    """One run of the refinery over `data`, from the start or from where the last attempt ended."""

    def __init__(self, data: Artifact, kind: str, steps: Sequence[Step], work: Path, progress: Progress) -> None:
        self.data, self.kind, self.steps, self.work, self.progress = data, kind, steps, work, progress
        self.tally = Tally()

    def run(self, out: Path) -> dict[str, Any]:
        """Write the records that passed below `out`, the others to `out/rejected`. Returns the metrics."""
        started = time.perf_counter()
        total = count(self.data) if shards_of(self.data) else None
        rows_out, bytes_out, languages = 0, Counter[str](), Counter[str]()
        with Rejects(out) as rejects, ShardWriter(out, self.kind) as writer:
            records: Iterable[Record] = self._counted(read(self.data, self.kind, rejects), total)
            for number, (_, group) in enumerate(groupby(self.steps, lambda step: isinstance(step, CorpusStep))):
                steps = list(group)
                whole = [step for step in steps if isinstance(step, CorpusStep)]
                if not whole:
                    records = self._map(steps, records, self.work / f"{number:02d}", rejects)
                for step in whole:
                    records = self._decide(step, records, rejects)
            for record in records:
                writer.write(record)
                rows_out += 1
                bytes_out[record.language] += size_of(record)
                languages[record.language] += 1
            refused = rejects.reasons
        seconds = time.perf_counter() - started
        masked = {key.removeprefix("pii/"): n for key, n in sorted(self.tally.notes.items()) if key.startswith("pii/")}
        return {
            "rows_in": self.tally.rows_in, "rows_out": rows_out,
            "bytes_in": self.tally.bytes_in, "bytes_out": bytes_out.total(),
            "rows_by_language": dict(sorted(languages.items())), "bytes_by_language": dict(sorted(bytes_out.items())),
            "rejected": refused, "pii": masked,
            "notes": {key: n for key, n in sorted(self.tally.notes.items()) if n and not key.startswith("pii/")},
            "seconds_by_step": {name: round(s, 2) for name, s in self.tally.seconds.items()},
            "bytes_per_second": round(self.tally.bytes_in / max(seconds, 1e-9)),
        }  # fmt: skip

    def _counted(self, records: Iterable[Record], total: int | None) -> Iterator[Record]:
        for record in records:
            self.tally.rows_in += 1
            self.tally.bytes_in += size_of(record)
            self.progress(self.tally.rows_in, total)
            yield record

    def _map(self, steps: list[Step], records: Iterable[Record], folder: Path, rejects: Rejects) -> Iterator[Record]:
        stream = iter(records)
        for number in range(10**9):
            some = list(islice(stream, CHUNK))
            if not some:
                return
            chunk = folder / f"{number:06d}"
            if (chunk / _DONE).is_file():  # an earlier attempt came so far
                notes = json.loads((chunk / _DONE).read_text(encoding="utf-8"))
                passed: Iterable[Record] = read(chunk, self.kind)
            else:
                passed, notes = self._make_chunk(steps, some, chunk)
            self.tally.notes.update(notes["counts"])
            for row in notes["rejected"]:
                rejects.add(*row)
            yield from passed

    def _make_chunk(self, steps: list[Step], records: list[Record], chunk: Path) -> tuple[list[Record], dict[str, Any]]:
        """Run the steps over some records and leave the result in `chunk`, which appears whole or not at all."""
        counts: Counter[str] = Counter()
        passed, rejected = [], []
        for record in records:
            result = self._through(steps, record, counts)
            if isinstance(result, tuple):
                rejected.append(result)
            else:
                passed.append(result)
        notes = {"counts": counts, "rejected": rejected}
        making = chunk.with_name(f".{chunk.name}")
        shutil.rmtree(making, ignore_errors=True)
        with ShardWriter(making, self.kind) as writer:
            for record in passed:
                writer.write(record)
        (making / _DONE).write_text(json.dumps(notes, sort_keys=True), encoding="utf-8")
        shutil.rmtree(chunk, ignore_errors=True)
        making.rename(chunk)
        return passed, notes

    def _through(self, steps: list[Step], record: Record, counts: Counter[str]) -> Record | tuple[str, ...]:
        """The record behind the last step, or the row of `Rejects` it became."""
        for step in steps:
            started = time.perf_counter()
            result = step(record, counts)
            self.tally.seconds[step.name] += time.perf_counter() - started
            if isinstance(result, Rejected):
                return (step.name, *_rejection(result, record))
            record = result
        return record

    def _decide(self, step: CorpusStep, records: Iterable[Record], rejects: Rejects) -> list[Record]:
        kept = list(records)
        started = time.perf_counter()
        refused = step.decide(kept)
        self.tally.seconds[step.name] += time.perf_counter() - started
        for index in sorted(refused):
            rejects.add(step.name, *_rejection(refused[index], kept[index]))
        return [record for index, record in enumerate(kept) if index not in refused]


def _rejection(rejected: Rejected, record: Record) -> tuple[str, str, str, str]:
    """Reason, value, the row as JSON, and its id."""
    return rejected.reason, rejected.value, json.dumps(to_row(record), ensure_ascii=False), record.id
