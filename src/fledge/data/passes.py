"""One pass of the refinery over the corpus: chunk by chunk, in any process, each chunk a folder that appears whole.

A pass applies the verdicts of the corpus step before it, runs the steps that look at one chunk at a time, and sketches
what is left for the corpus step behind it. The folder of a finished chunk holds

    rows.arrow      what passed               rejected/    what did not, with step, reason and value
    sketch.arrow    for the step behind       done.json    counts; written last

so that a refinery that was killed goes on behind the chunks that are there, whichever process made them.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.data.chunk import Chunk
from fledge.data.inputs import Rows, made_once
from fledge.data.steps import read_step, write_step
from fledge.data.steps.base import CorpusStep, Refused, Step
from fledge.records.rejects import Rejects

if TYPE_CHECKING:
    import pyarrow as pa

ROWS, SKETCH = "rows.arrow", "sketch.arrow"
Found = Mapping[str, list[Path]]  # text of a reference or source → the files behind it


@dataclass(frozen=True)
class Pass:
    """What happens to every chunk alike."""

    kind: str
    steps: tuple[Step, ...] = ()
    after: CorpusStep | None = None  # whose verdicts are applied first
    verdicts: Path | None = None
    before: CorpusStep | None = None  # for which what is left is sketched
    keep_rows: bool = True  # False: nothing changes, the rows stay where they are
    found: Found | None = None

    def to_json(self) -> str:
        """The pass as worker processes are told of it: steps by name and options, as a recipe writes them."""
        after, before = (step and write_step(step) for step in (self.after, self.before))
        found = {text: list(map(str, files)) for text, files in (self.found or {}).items()}
        said = {"kind": self.kind, "steps": list(map(write_step, self.steps)), "after": after, "before": before}
        said |= {"verdicts": str(self.verdicts or ""), "keep_rows": self.keep_rows, "found": found}
        return json.dumps(said, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Pass:
        """The inverse of `to_json`."""
        said = json.loads(text)
        after, before = (step and read_step(step) for step in (said["after"], said["before"]))
        assert after is None or isinstance(after, CorpusStep)
        assert before is None or isinstance(before, CorpusStep)
        found = {text: list(map(Path, files)) for text, files in said["found"].items()}
        steps = tuple(map(read_step, said["steps"]))
        return cls(said["kind"], steps, after, Path(said["verdicts"]), before, said["keep_rows"], found)


@dataclass(frozen=True)
class Piece:
    """One chunk of one pass: the unit of work that a process is given."""

    description: str  # a Pass as JSON
    rows: Rows
    first: int  # the global number of its first row
    folder: Path


def make(piece: Piece) -> dict[str, Any]:
    """Make the chunk unless it is there; returns what was noted about it."""
    return made_once(piece.folder, lambda folder: _work(piece, folder))


def _work(piece: Piece, folder: Path) -> dict[str, Any]:
    todo = _ready(piece.description)
    return _Work(todo).run(Chunk(todo.kind, piece.rows.read(todo.kind)), piece.first, folder)


@lru_cache(maxsize=2)
def _ready(description: str) -> Pass:
    """The pass with its steps started: once in each process."""
    todo = Pass.from_json(description)
    files = todo.found or {}
    for step in (*todo.steps, *filter(None, (todo.after, todo.before))):
        step.start(lambda named: files[named.text])
    return todo


class _Work:
    """One chunk on its way through a pass."""

    def __init__(self, todo: Pass) -> None:
        self.todo = todo
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def run(self, chunk: Chunk, first: int, folder: Path) -> dict[str, Any]:
        with Rejects(folder) as self.rejects:
            return self._run(chunk, first, folder)

    def _run(self, chunk: Chunk, first: int, folder: Path) -> dict[str, Any]:
        rows_in, bytes_in = len(chunk), _size(chunk)
        if self.todo.after is not None:
            with _Timed(self.seconds, self.todo.after.name):
                verdicts = _verdicts(self.todo.verdicts, first, rows_in)
                changed, refused = self.todo.after.apply(chunk, verdicts, self.counts)
            chunk = self._without(changed, refused, self.todo.after.name)
        for step in self.todo.steps:
            with _Timed(self.seconds, step.name):
                changed, refused = step(chunk, self.counts)
            chunk = self._without(changed, refused, step.name)
        if self.todo.before is not None:
            with _Timed(self.seconds, self.todo.before.name):
                # hashes: nothing to gain by packing
                write_table(self.todo.before.sketch(chunk), folder / SKETCH, compression=None)
        if self.todo.keep_rows:
            write_table(chunk.rows, folder / ROWS)
        return {
            "rows_in": rows_in, "bytes_in": bytes_in, "rows": len(chunk), "counts": dict(self.counts),
            "seconds": dict(self.seconds),
            **({} if self.todo.before else _by_language(chunk)),
        }  # fmt: skip

    def _without(self, chunk: Chunk, refused: Refused, step: str) -> Chunk:
        if not refused:
            return chunk
        for row, fields in zip(sorted(refused), chunk.take(sorted(refused)).rows.to_pylist(), strict=True):
            text = json.dumps(fields, ensure_ascii=False)
            self.rejects.add(step, refused[row].reason, refused[row].value, text, fields["id"])
        return chunk.take([row for row in range(len(chunk)) if row not in refused])


class _Timed:
    def __init__(self, seconds: Counter[str], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] += time.perf_counter() - self.started  # type: ignore[assignment]


def _size(chunk: Chunk) -> int:
    """UTF-8 bytes of all texts."""
    import pyarrow.compute as pc

    if chunk.kind in ("documents", "labelled"):
        return int(pc.sum(pc.binary_length(chunk.rows["text"])).as_py() or 0)
    from fledge.data.texts import size_of

    return sum(chunk.of_each_record(size_of))


def _sizes(chunk: Chunk) -> list[int]:
    """UTF-8 bytes of each row's texts, line breaks between them included."""
    import pyarrow.compute as pc

    if chunk.kind in ("documents", "labelled"):
        return pc.binary_length(chunk.rows["text"]).to_pylist()  # type: ignore[no-any-return]
    return [len(text.encode("utf-8", "surrogatepass")) for text in chunk.texts]


def _by_language(chunk: Chunk) -> dict[str, Any]:
    """Rows and bytes of what passed, by language."""
    rows, size = Counter[str](), Counter[str]()
    for language, length in zip(chunk.languages, _sizes(chunk), strict=True):
        rows[language] += 1
        size[language] += length
    return {"rows_by_language": dict(rows), "bytes_by_language": dict(size)}


def _verdicts(file: Path | None, first: int, count: int) -> pa.Table:
    """The verdicts on rows [first, first + count), `row` counted from `first`."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.ipc as ipc

    assert file is not None
    with pa.memory_map(str(file)) as source:
        table = ipc.open_file(source).read_all()
        numbers = table["row"].combine_chunks().to_numpy(zero_copy_only=False)
        low, high = np.searchsorted(numbers, (first, first + count))
        mine = pa.Table.from_pylist(table.slice(low, high - low).to_pylist(), schema=table.schema)
    return mine.set_column(mine.column_names.index("row"), "row", pc.subtract(mine["row"], first))


def write_table(table: pa.Table, file: Path, compression: str | None = "lz4") -> None:
    """An Arrow file, written through to the disk's cache and closed."""
    import pyarrow as pa
    import pyarrow.ipc as ipc

    options = ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(file), "wb") as sink, ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
