"""What a step of the refinery is. Light by rule: schemas are read by `fledge --help`.

Four shapes, from the narrow to the wide; take the first that fits:

    Filter      judge(text, language) → None, or why the row is refused
    RecordStep  look(record, counts) → the record, changed or not, or why it is refused
    Step        step(chunk, counts) → the chunk, changed or not, and why rows of it are refused
    CorpusStep  sketch(chunk), then decide(sketches), then apply(chunk, verdicts): rows are compared with each other

Steps are pure: the same chunk gives the same result in any process and any order. They are sent to worker processes
as they are; what is heavy (a model, a list of words) is loaded by `start`, once in each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from fledge.core.reference import Ref, Source
from fledge.core.stage import Config
from fledge.records.kinds import Record

if TYPE_CHECKING:
    import pyarrow as pa

    from fledge.data.chunk import Chunk


@dataclass(frozen=True)
class Rejected:
    """Why a record is set aside: the rule that it broke and the value that broke it."""

    reason: str
    value: str = ""


Refused: TypeAlias = dict[int, Rejected]
"""Rows of a chunk that are set aside, by their position."""
Find: TypeAlias = Callable[[Ref[object] | Source], list[Path]]  # type: ignore[type-var]
"""Where the files behind an option of a step lie: an artifact's folder, a file, the files of a package."""


class Step(Config):
    """Looks at one chunk at a time. A step is its own schema: its fields are its options."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "") -> None:
        cls.name = name

    def start(self, find: Find) -> None:
        """Load what the step needs besides its options; called once in every process, before the first chunk."""

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        """The chunk with the same rows in the same order, changed or not, and which of them are refused and why.

        What is worth a number goes into `counts`.
        """
        raise TypeError(f"{type(self).__name__} does not look at chunks")


class Filter(Step):
    """Judges texts one at a time and changes nothing."""

    def judge(self, text: str, language: str) -> Rejected | None:
        """None to keep the text, or why it is refused."""
        raise TypeError(f"{type(self).__name__} judges nothing")

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        judged = map(self.judge, chunk.texts, chunk.languages)
        return chunk, {row: verdict for row, verdict in enumerate(judged) if verdict is not None}


class RecordStep(Step):
    """Looks at records one at a time and may change them."""

    def look(self, record: Record, counts: Counter[str]) -> Record | Rejected:
        """The record, changed or not, or why it is refused."""
        raise TypeError(f"{type(self).__name__} looks at nothing")

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        refused: Refused = {}
        records = list(chunk.records)
        for row, record in enumerate(chunk.records):
            result = self.look(record, counts)
            if isinstance(result, Rejected):
                refused[row] = result
            else:
                records[row] = result
        same = all(a is b for a, b in zip(records, chunk.records, strict=True))
        return chunk if same else type(chunk).of(chunk.kind, records), refused


class Sketches:
    """What `CorpusStep.sketch` said of every chunk of the corpus, on disk, in the order of the corpus.

    `row` counts through the whole corpus. `scratch` is an empty folder for sorting out of core.
    """

    def __init__(self, files: list[Path], starts: list[int], rows: int, scratch: Path) -> None:
        self.files, self.starts, self.rows, self.scratch = files, starts, rows, scratch

    def tables(self, columns: list[str] | None = None, first: int = 0) -> Iterator[pa.Table]:
        """One table a chunk, `row` counted from `first` on. Only `columns` are read, as far as they are looked at."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.ipc as ipc

        for file, start in zip(self.files, self.starts, strict=True):
            with pa.memory_map(str(file)) as source:
                with ipc.open_file(source) as batches:
                    names = batches.schema.names if columns is None else columns
                    wanted = ipc.IpcReadOptions(included_fields=[batches.schema.names.index(name) for name in names])
                with ipc.open_file(source, options=wanted) as batches:
                    for number in range(batches.num_record_batches):
                        table = pa.Table.from_batches([batches.get_batch(number)])
                        if "row" in names and start + first:
                            at = table.schema.names.index("row")
                            table = table.set_column(at, "row", pc.add(table["row"], start + first))
                        yield table


class CorpusStep(Step):
    """Compares rows of the whole corpus with each other, out of core, in three parts.

    1. `sketch` of every chunk, in parallel: an Arrow table, small beside the texts. A column `row` (int64) is the
       row's position in the chunk; there may be none, one or several lines for a row.
    2. `decide`, once: from all sketches a table of verdicts with a column `row`. Its memory may grow with the number
       of verdicts, and with a few bytes a row, not with the text.
    3. `apply` to every chunk, in parallel, with its own verdicts. By default a verdict (row, reason, value) refuses
       the row.

    The set of texts kept does not depend on their order, nor on how many processes work.
    """

    def sketch(self, chunk: Chunk) -> pa.Table:
        """What must be known of a chunk to decide on the corpus."""
        raise TypeError(f"{type(self).__name__} sketches nothing")

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        """The verdicts, sorted by `row`. `earlier` are the sketches of corpora that came before (`against`): a row
        that repeats one of theirs goes, whatever its rank."""
        raise TypeError(f"{type(self).__name__} decides nothing")

    def kept(self, sketch: pa.Table, verdicts: pa.Table) -> pa.Table:
        """What an index keeps of a chunk's sketch (`keep_index`), given the verdicts on its rows: by default the lines
        of rows that are not refused."""
        import pyarrow.compute as pc

        return sketch.filter(pc.invert(pc.is_in(sketch["row"], value_set=verdicts["row"].combine_chunks())))

    def apply(self, chunk: Chunk, verdicts: pa.Table, counts: Counter[str]) -> tuple[Chunk, Refused]:
        """The chunk behind the decision; `row` in `verdicts` is the position in the chunk."""
        columns = (verdicts[name].to_pylist() for name in ("row", "reason", "value"))
        return chunk, {row: Rejected(reason, value) for row, reason, value in zip(*columns, strict=True)}
