"""Collecting: everything that is named as a source, as records of one kind.

The sources are cut into units of work (a few small files, a big one, or a span of a very big file of lines), and each
unit is read in some process of its own into a folder that appears whole:

    rows.arrow   the records        rejected/   what could not be used        unit.json   counts; written last

A collection that was killed goes on behind the units that are there. What comes out is the units in their order, and
how they are cut depends on the files alone: the result is the same for any number of processes.
"""

from __future__ import annotations

import heapq
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Outside
from fledge.core.workers import spread
from fledge.data import sources
from fledge.data.ngrams import hash64
from fledge.data.sources.packages import read_package
from fledge.data.texts import size_of
from fledge.records.formats import Unusable, load
from fledge.records.kinds import Conversation, Record, as_document, schema, to_row
from fledge.records.raw.files import READERS, is_data
from fledge.records.raw.packed import PACKED, Span, is_packed, spans, streams, suffix_of
from fledge.records.raw.rows import Limits
from fledge.records.rejects import Rejects, read_rejects
from fledge.records.shards import ShardWriter, read_shard, shards_of

ROWS, DONE = "rows.arrow", "unit.json"
UNIT_BYTES = 32_000_000  # a unit of small files, or of lines of a big one, is about as big
UNIT_FILES = 1_000
WORTH = 8_000_000  # bytes; starting processes takes about as long as reading so much
_GROUP_ROWS, _GROUP_BYTES = 2_000, 16_000_000
_NOT_DATA = ("README.md", "dataset_infos.json")  # of a repository on the Hub: what is said of the data
_PROBLEMS = 5
_LINES = (".jsonl", ".ndjson")
_LIMITS = Limits()


@dataclass(frozen=True)
class Unit:
    """What one process reads at once. `reader` is "package", "shards", "" (`records.formats`) or one of `sources`."""

    folder: Path
    kind: str
    source: Outside
    reader: str
    files: tuple[str, ...] = ()
    span: Span | None = None
    limits: Limits = _LIMITS
    limit: int | None = None
    seed: int = 0
    bytes: int = 0


def collect(
    job: Job,
    found: Iterable[Outside],
    kind: str,
    limit: int | None = None,
    limits: Limits | None = None,
    code: bool = False,
) -> dict[str, Any]:
    """Write the records of all sources below `job.out`, one source after another. Returns the metrics.

    `limit` keeps that many records of each source; `code` reads every file as source code. Raises FledgeError where a
    source has not one usable row, or is no longer there.
    """
    units: list[Unit] = []
    skipped = Counter[str]()
    seed = job.rng_seed("collect")
    for source in found:
        for unit in _units_of(source, kind, code, skipped):
            folder = job.work / "collect" / f"{len(units):06d}"
            units.append(replace(unit, folder=folder, limits=limits or Limits(), limit=limit, seed=seed))
    done, total = 0, sum(unit.bytes for unit in units)
    alone = job.execution.model_copy(update={"workers": 1, "executor": "local"})
    for read in spread(make, units, job.execution if total > WORTH else alone):
        done += read
        job.events.progress(done, total, unit="bytes")
    notes = [json.loads((unit.folder / DONE).read_text(encoding="utf-8")) for unit in units]
    _refuse_empty(units, notes)
    chosen = _chosen(units, notes) if limit is not None else [None] * len(units)
    count, size, languages = Counter[str](), Counter[str](), Counter[str]()
    with Rejects(job.out) as rejects, ShardWriter(job.out, kind) as writer:
        lines = 0  # of the same file, before the unit's span
        for unit, note, rows in zip(units, notes, chosen, strict=True):
            lines = lines if unit.span and unit.span[0] else 0
            _take_rejects(unit, lines, rejects)
            lines += note["lines"]
            of = unit.source.text
            for table in _tables(unit, rows):
                writer.write_table(table)
                count[of] += table.num_rows
                languages.update(table["language"].to_pylist())
            size[of] += note["bytes"] if rows is None else sum(note["sizes"][row] for row in rows)
    return {
        "rows": count.total(), "bytes": size.total(), "rows_by_source": dict(count), "bytes_by_source": dict(size),
        "rows_by_language": dict(sorted(languages.items())), "rejected": rejects.reasons,
        "skipped_files": dict(sorted(skipped.items())),
        "files": sum(len(unit.files) for unit in units if not (unit.span and unit.span[0])),
    }  # fmt: skip


def some_of(records: Iterable[Record], limit: int, seed: int) -> list[Record]:
    """The `limit` records whose hash of id and seed is smallest, in the order in which they came.

    Which they are does not depend on the order, and a larger limit only adds to them.
    """
    return [record for _, _, record in _smallest(records, limit, seed)]


def _smallest(records: Iterable[Record], limit: int, seed: int) -> list[tuple[int, int, Record]]:
    keyed = ((hash64(f"{seed}:{record.id}"), number, record) for number, record in enumerate(records))
    return sorted(heapq.nsmallest(limit, keyed, key=lambda item: item[:2]), key=lambda item: item[1])


# --- the units ------------------------------------------------------------------------------------------------------


def _units_of(source: Outside, kind: str, code: bool, skipped: Counter[str]) -> Iterator[Unit]:
    """The units of a source; files of no use are counted by their ending in `skipped`."""
    whole = Unit(Path(), kind, source if source.scheme == "package" else replace(source, files=()), "")
    if source.scheme == "package":
        files = [source.path / name for name in source.files]
        yield replace(whole, reader="package", files=("",), bytes=sum(f.stat().st_size for f in files if f.is_file()))
    elif shards := shards_of(source.path):
        for shard in shards:
            name = shard.relative_to(source.path).as_posix()
            yield replace(whole, reader="shards", files=(name,), bytes=shard.stat().st_size)
    else:
        files_read = list(_files_of(source, code, skipped))
        if not files_read:
            what = t("is not a data file") if source.path.is_file() else t("holds no data file")
            allowed = listing([*READERS, ".xml", ".tex", *PACKED], 30)
            raise FledgeError(Problem(what, where=source.text, allowed=allowed))
        for name, reader in files_read:
            _check_kind(reader, kind, name)
        yield from _cut(whole, files_read)


def _files_of(source: Outside, code: bool, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    """(name, reader) of each file of use."""
    base, globbed = _base(source), any(mark in source.text for mark in "*?[")
    code = code or (not globbed and source.path.is_dir() and (base / ".git").exists())
    for name in source.files:
        # A pattern may lead through a hidden folder; what lies hidden below a folder nobody has named.
        if _hidden(name.rpartition("/")[2] if globbed else name) or (source.scheme == "hub" and name in _NOT_DATA):
            continue
        file = _there(base / name)
        reader = "code" if code else sources.reader_for(file)
        if reader or is_data(file):
            yield name, reader
        else:
            skipped[suffix_of(file) or file.name] += 1


def _cut(whole: Unit, files: list[tuple[str, str]]) -> Iterator[Unit]:
    """Files one after another: small ones of the same reader together, a big one in spans where it can be cut."""
    group: list[str] = []
    held, current = 0, ""

    def grouped() -> Iterator[Unit]:
        if group:
            yield replace(whole, reader=current, files=tuple(group), bytes=held)

    for name, reader in files:
        file = _there(_base(whole.source) / name)
        size = file.stat().st_size
        parts = _spans_of(file, reader) if size > 2 * UNIT_BYTES else []
        if len(parts) > 1 or reader != current or held >= UNIT_BYTES or len(group) >= UNIT_FILES:
            yield from grouped()
            group, held, current = [], 0, reader
        if len(parts) > 1:
            for span in parts:
                yield replace(whole, reader=reader, files=(name,), span=span, bytes=span[1] - span[0])
        else:
            group.append(name)
            held += size
    yield from grouped()


def _spans_of(file: Path, reader: str) -> list[Span]:
    """The spans of a file of lines, or of a dump of many streams; none of any other."""
    if not reader and suffix_of(file) in _LINES and not is_packed(file):
        return spans(file, UNIT_BYTES)
    return streams(file, UNIT_BYTES) if reader == "wikipedia" and file.suffix.lower() == ".bz2" else []


def _base(source: Outside) -> Path:
    """The folder below which the source's files are named."""
    return source.path if source.path.is_dir() else source.path.parent


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _there(file: Path) -> Path:
    """The file, which was there when the run was planned. Raises FledgeError where it is gone."""
    if not file.exists():
        what, fix = t("was there when the run was planned and is gone"), t("put it back, or take it out of the sources")
        raise FledgeError(Problem(what, where=str(file), fix=fix))
    return file


def _check_kind(reader: str, kind: str, name: str) -> None:
    found = sources.READERS.get(reader, kind)
    if found != kind and (found, kind) != ("conversations", "documents"):
        raise FledgeError(t("{path} holds {found} where {wanted} are wanted", path=name, found=found, wanted=kind))


# --- one unit, in any process ---------------------------------------------------------------------------------------


def make(unit: Unit) -> int:
    """Read the unit unless it is there; returns its size in bytes."""
    if (unit.folder / DONE).is_file():
        return unit.bytes
    making = unit.folder.with_name(f".{unit.folder.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    problems: list[Problem] = []
    keys: list[int] = []
    sizes: list[int] = []
    total = 0
    with Rejects(making) as rejects, _Rows(making / ROWS, unit.kind) as rows:
        records = _records(unit, rejects, making / "scratch", problems)
        if unit.limit is None:
            for record in records:
                total += rows.add(record, unit.source.text)
        else:
            for key, _, record in _smallest(records, unit.limit, unit.seed):
                sizes.append(rows.add(record, unit.source.text))
                keys.append(key)
    note = {
        "rows": rows.count, "bytes": total, "keys": keys, "sizes": sizes, "lines": _lines_in(unit),
        "problems": [vars(problem) for problem in problems],
    }  # fmt: skip
    (making / DONE).write_text(json.dumps(note, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(unit.folder, ignore_errors=True)
    making.rename(unit.folder)
    return unit.bytes


def _records(unit: Unit, rejects: Rejects, scratch: Path, problems: list[Problem]) -> Iterator[Record]:
    """The records of a unit. A file without one usable row goes to `problems`, and among the rejected."""
    source = unit.source
    if unit.reader == "package":
        yield from read_package(source, unit.kind, rejects)
        return
    if unit.reader == "shards":
        yield from read_shard(_there(source.path / unit.files[0]), unit.kind)
        return
    base = _base(source)
    for name in unit.files:
        before = sum(rejects.counts.values())
        file = _there(base / name)
        try:
            if unit.reader:
                yield from _by_reader(unit, file, base, rejects, scratch)
            else:
                yield from load(file, unit.kind, rejects, unit.limits, unit.span)
        except Unusable as error:
            problems += error.problems[: _PROBLEMS - len(problems)]
            if sum(rejects.counts.values()) == before:
                rejects.add(sources.STEP, "no row of the file can be used", where=name)


def _by_reader(unit: Unit, file: Path, base: Path, rejects: Rejects, scratch: Path) -> Iterator[Record]:
    scratch.mkdir()
    setting = sources.Setting(base, rejects, unit.limits, scratch, unit.span)
    for record in sources.reader(unit.reader)(file, setting):
        documents = unit.kind == "documents" and isinstance(record, Conversation)
        yield as_document(record) if documents else record  # type: ignore[arg-type]
    shutil.rmtree(scratch)


def _lines_in(unit: Unit) -> int:
    """The lines of a span, for the places of those behind it."""
    if unit.span is None or unit.reader:
        return 0
    from fledge.records.raw.packed import open_packed

    with open_packed(_base(unit.source) / unit.files[0], unit.limits, unit.span) as stream:
        return sum(piece.count(b"\n") for piece in iter(lambda: stream.read(1 << 20), b""))


class _Rows:
    """Records written as an Arrow file, a batch at a time."""

    def __init__(self, file: Path, kind: str) -> None:
        import pyarrow as pa
        import pyarrow.ipc as ipc

        self._columns, self._rows, self._size = schema(kind), list[dict[str, Any]](), 0
        self._sink = pa.OSFile(str(file), "wb")
        self._file = ipc.new_file(self._sink, self._columns, options=ipc.IpcWriteOptions(compression="lz4"))
        self.count = 0

    def add(self, record: Record, source: str) -> int:
        """Append a record, its source named; returns the bytes of its texts."""
        self._rows.append(to_row(record if record.source else replace(record, source=source)))
        size = size_of(record)
        self._size += size
        self.count += 1
        if len(self._rows) >= _GROUP_ROWS or self._size >= _GROUP_BYTES:
            self._flush()
        return size

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._columns))
        self._rows, self._size = [], 0

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self._flush()
            self._file.close()
        self._sink.close()


# --- all of them together -------------------------------------------------------------------------------------------


def _refuse_empty(units: list[Unit], notes: list[dict[str, Any]]) -> None:
    """Raise the first problems of the sources of which not one row can be used."""
    rows, problems = Counter[str](), dict[str, list[Problem]]()
    for unit, note in zip(units, notes, strict=True):
        rows[unit.source.text] += note["rows"]
        problems.setdefault(unit.source.text, []).extend(Problem(**problem) for problem in note["problems"])
    for text, count in rows.items():
        if not count:
            raise FledgeError(*(problems[text][:_PROBLEMS] or [Problem(t("not one row can be used"), where=text)]))


def _chosen(units: list[Unit], notes: list[dict[str, Any]]) -> list[list[int] | None]:
    """Which rows of each unit are among the `limit` smallest hashes of its source."""
    rows: list[list[int] | None] = [[] for _ in units]
    by_source: dict[str, list[tuple[int, int, int]]] = {}
    for number, (unit, note) in enumerate(zip(units, notes, strict=True)):
        ours = ((key, number, row) for row, key in enumerate(note["keys"]))
        by_source.setdefault(unit.source.text, []).extend(ours)
    for keyed in by_source.values():
        for _, number, row in sorted(heapq.nsmallest(units[0].limit or 0, keyed), key=lambda item: item[1:]):
            rows[number].append(row)  # type: ignore[union-attr]
    return rows


def _tables(unit: Unit, rows: list[int] | None) -> Iterator[Any]:
    """The unit's rows, batch by batch; of those numbered in `rows`, where there is a choice."""
    import pyarrow as pa
    import pyarrow.ipc as ipc

    first = 0
    with pa.memory_map(str(unit.folder / ROWS)) as source, ipc.open_file(source) as file:
        for number in range(file.num_record_batches):
            table = pa.Table.from_batches([file.get_batch(number)])
            size = table.num_rows
            if rows is not None:
                table = table.take(pa.array([row - first for row in rows if first <= row < first + size], pa.int64()))
            first += size
            if table.num_rows:
                yield table


def _take_rejects(unit: Unit, lines: int, rejects: Rejects) -> None:
    """What the unit set aside; the rows of a span know their line within it, `lines` stand before it."""
    if not lines:
        rejects.take_from(unit.folder)
        return
    for row in read_rejects(unit.folder):
        name, _, line = row["where"].rpartition(":")
        where = f"{name}:{int(line) + lines}" if line.isdigit() else row["where"]
        rejects.add(row["step"], row["reason"], row["value"], row["row"], where)
