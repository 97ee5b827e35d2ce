"""Carrying out a mixture (`shares`) out of core: measured, planned, sent into buckets, and written in order.

What is kept in memory is some tens of bytes for every text, never a text: the sources' row groups are measured in
parallel, the plan gives every chosen text its place in the mixture, each row group sends its texts into the buckets
of the places they go to, and bucket after bucket is sorted and written. The result depends on the texts, the config
and the seed; not on the number of processes, and not on how often they were killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.workers import spread
from fledge.data.chunk import Chunk
from fledge.data.inputs import Rows, made_once, rows_of, set_aside
from fledge.data.mixing.curriculum import buckets_of
from fledge.data.mixing.shares import MANY_EPOCHS, Chosen, Wish, amounts, choose, in_order, weights_by_genre
from fledge.data.ngrams import hash64
from fledge.data.passes import ROWS
from fledge.data.texts import size_of
from fledge.data.tokens.packer import one_thread, plain_of
from fledge.data.tokens.packing import encode_all
from fledge.records.kinds import Conversation, as_document, texts
from fledge.records.shards import ShardWriter

if TYPE_CHECKING:
    import pyarrow as pa

    from fledge.data.tokens.stages import Mix

_BUCKET = 2**26  # bytes of text that are sorted at once
FACTS = {
    "hash": "u8",
    "size": "i8",
    "bytes": "i8",
    "score": "f8",
    "language": "u8",
}  # of the id and the language, a hash


@dataclass(frozen=True)
class Measuring:
    """One row group to measure: the hash of each id, its length in tokens or bytes, its score for the curriculum."""

    rows: Rows
    kind: str
    tokenizer: Path | None
    score: str
    folder: Path


@dataclass(frozen=True)
class Sending:
    """One row group whose chosen texts go into buckets."""

    rows: Rows
    kind: str
    to_kind: str
    source: str
    chosen: NDArray[np.int64]  # rows of the group
    epochs: NDArray[np.int64]
    places: NDArray[np.int64]  # in the mixture
    buckets: NDArray[np.int64]
    folder: Path


@dataclass(frozen=True)
class Measured:
    """One source: its chunks and, row by row, what was measured."""

    kind: str
    chunks: list[Rows]
    facts: Mapping[str, NDArray[Any]]

    @property
    def size(self) -> int:
        return int(self.facts["size"].sum())


class Mixer:
    """One run of a mixture for a job."""

    def __init__(self, stage: Mix, job: Job) -> None:
        self.stage, self.job = stage, job
        self.tokenizer = job.open(stage.tokenizer).path if stage.tokenizer else None

    def run(self) -> tuple[str, dict[str, Any]]:
        """Write the mixture below `job.out`. Returns the kind of its records and the metrics."""
        sources = {name: self._measure(name, self.job.open(source.data)) for name, source in self.stage.sources.items()}
        kinds = {source.kind for source in sources.values()}
        if len(kinds) > 1 and kinds != {"documents", "conversations"}:
            found = ", ".join(f"{name}: {source.kind}" for name, source in sources.items())
            raise FledgeError(Problem(t("the sources of a mixture must hold records of one kind"), found=found))
        kind = kinds.pop() if len(kinds) == 1 else "documents"
        wanted = amounts(self._wishes(sources), self.stage.budget, self.stage.temperature, self.stage.max_epochs)
        chosen = {name: self._choose(name, source, wanted[name]) for name, source in sources.items()}
        self._write(kind, sources, chosen)
        rejected = set_aside((self.job.work / f"raw-{name}" for name in sources), self.job.out)
        return kind, {**self._metrics(sources, chosen), "rejected": rejected}

    def _measure(self, name: str, data: Artifact) -> Measured:
        kind, chunks = rows_of(data, self.job.work / f"raw-{name}", self.job.events.progress)
        curriculum = self.stage.curriculum
        score = "" if curriculum is None or curriculum.by == "length" else curriculum.by
        works = [
            Measuring(chunk, kind, self.tokenizer, score, self.job.work / f"facts-{name}" / f"{number:06d}")
            for number, chunk in enumerate(chunks)
        ]
        for done, _ in enumerate(spread(measure, works, self.job.execution), 1):
            self.job.events.progress(done, len(works), name)
        parts = [{fact: np.load(work.folder / f"{fact}.npy") for fact in FACTS} for work in works]
        facts = {
            fact: np.concatenate([p[fact] for p in parts]) if parts else np.zeros(0, kind_)
            for fact, kind_ in FACTS.items()
        }
        if curriculum and not score:
            facts["score"] = facts["size"].astype(np.float64)
        if curriculum and (missing := int(np.isnan(facts["score"]).sum())):
            raise FledgeError(
                Problem(
                    t('{count} records of "{name}" have no number called {key}', count=missing, name=name, key=score),
                    where=str(data.path),
                    fix=t("run the step that measures it before mixing, or order by length"),
                )
            )
        return Measured(kind, chunks, facts)

    def _wishes(self, sources: Mapping[str, Measured]) -> dict[str, Wish]:
        asked = self.stage.sources
        preset: dict[str, float] = {}
        if self.stage.preset:
            genres = {n: s.genre for n, s in asked.items() if s.genre and s.weight is None and s.epochs is None}
            preset = weights_by_genre(self.stage.preset, genres, {name: sources[name].size for name in genres})
        wishes = {}
        for name, source in asked.items():
            weight = preset.get(name, source.weight)
            if source.tier and source.epochs is None:
                weight = (sources[name].size if weight is None else weight) * self.stage.tiers[source.tier]
            wishes[name] = Wish(sources[name].size, weight, source.epochs)
        return wishes

    def _choose(self, name: str, source: Measured, amount: int) -> Chosen:
        facts, curriculum = source.facts, self.stage.curriculum
        seed = self.job.rng_seed("mix", name)
        chosen = choose(facts["size"], facts["hash"], amount, seed)
        if curriculum is None:
            return chosen
        _, groups = np.unique(facts["language"], return_inverse=True)
        taken = chosen.rows
        buckets = buckets_of(
            facts["score"][taken], facts["size"][taken], groups[taken], facts["hash"][taken],
            curriculum.buckets, curriculum.order == "falling",
        )  # fmt: skip
        return Chosen(taken, chosen.epochs, (buckets + chosen.times) / curriculum.buckets)

    def _write(self, kind: str, sources: Mapping[str, Measured], chosen: Mapping[str, Chosen]) -> None:
        """Send the chosen texts into buckets, then write bucket after bucket in order."""
        order = in_order([some.times for some in chosen.values()])
        lengths = np.concatenate([sources[name].facts["bytes"][some.rows] for name, some in chosen.items()])
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        before = np.empty(len(order), dtype=np.int64)
        before[order] = np.cumsum(lengths[order]) - lengths[order]
        works = self._sendings(kind, sources, chosen, places, before // _BUCKET)
        of_bucket: dict[int, list[tuple[Path, int]]] = {}
        for done, _ in enumerate(spread(send, works, self.job.execution), 1):
            self.job.events.progress(done, 2 * len(works), "share")
        for work in works:
            for number, bucket in enumerate(send(work)["buckets"]):
                of_bucket.setdefault(bucket, []).append((work.folder, number))
        with ShardWriter(self.job.out, kind) as writer:
            for done, bucket in enumerate(sorted(of_bucket), 1):
                writer.write_table(_gathered(of_bucket[bucket]))
                self.job.events.progress(len(of_bucket) + done, 2 * len(of_bucket), "share")

    def _sendings(
        self, kind: str, sources: Mapping[str, Measured], chosen: Mapping[str, Chosen],
        places: NDArray[np.int64], buckets: NDArray[np.int64],
    ) -> list[Sending]:  # fmt: skip
        works, at = [], 0
        for name, source in sources.items():
            some, mine = chosen[name], slice(at, at + len(chosen[name].rows))
            at = mine.stop
            by_row = np.argsort(some.rows, kind="stable")
            starts = np.cumsum([0, *(chunk.count for chunk in source.chunks)])
            borders = np.searchsorted(some.rows[by_row], starts)
            for number, chunk in enumerate(source.chunks):
                taken = by_row[borders[number] : borders[number + 1]]
                if len(taken):
                    folder = self.job.work / f"sent-{name}" / f"{number:06d}"
                    works.append(
                        Sending(
                            chunk, source.kind, kind, name, some.rows[taken] - starts[number], some.epochs[taken],
                            places[mine][taken], buckets[mine][taken], folder,
                        )
                    )  # fmt: skip
        return works

    def _metrics(self, sources: Mapping[str, Measured], chosen: Mapping[str, Chosen]) -> dict[str, Any]:
        unit = "tokens" if self.tokenizer else "bytes"
        table: dict[str, dict[str, float]] = {}
        for name, source in sources.items():
            sizes, rows = source.facts["size"], chosen[name].rows
            table[name] = {
                "rows": len(rows), unit: int(sizes[rows].sum()), "available_rows": len(sizes),
                f"available_{unit}": source.size, "epochs": float(sizes[rows].sum()) / max(1, source.size),
                "most_often": int(np.bincount(rows).max()) if len(rows) else 0,
            }  # fmt: skip
        total = sum(entry[unit] for entry in table.values())
        for name, entry in table.items():
            entry["share"] = entry[unit] / max(1, total)
            if entry["epochs"] > MANY_EPOCHS:
                self.job.events.message(
                    t(
                        '"{name}" is read {epochs} times; beyond four, repeats teach ever less',
                        name=name,
                        epochs=f"{entry['epochs']:.1f}",
                    ),
                    "warning",
                )
        size = sum(int(source.facts["bytes"][chosen[name].rows].sum()) for name, source in sources.items())
        short = {"below_budget": self.stage.budget - total} if self.stage.budget is not None else {}
        return {
            "rows": sum(len(c.rows) for c in chosen.values()),
            "bytes": size,
            unit: total,
            "sources": table,
            **short,
        }


def measure(work: Measuring) -> dict[str, Any]:
    """Measure one row group, unless it is done."""

    def make(folder: Path) -> dict[str, Any]:
        chunk = Chunk(work.kind, work.rows.read(work.kind))
        sizes = _bytes(chunk)
        lengths = sizes if work.tokenizer is None else _tokens(chunk, work.tokenizer)
        scores = [0.0] * len(chunk)
        if work.score:
            metas = ({item["key"]: item["value"] for item in meta or []} for meta in chunk.rows["meta"].to_pylist())
            scores = [_number(meta.get(work.score)) for meta in metas]
        codes = {language: hash64(language or "") for language in set(chunk.languages)}
        values = {
            "hash": list(map(hash64, chunk.ids)), "size": lengths, "bytes": sizes, "score": scores,
            "language": [codes[language] for language in chunk.languages],
        }  # fmt: skip
        for fact, dtype in FACTS.items():
            np.save(folder / f"{fact}.npy", np.array(values[fact], dtype=dtype))
        return {"rows": len(chunk)}

    return made_once(work.folder, make)


def _bytes(chunk: Chunk) -> list[int]:
    """UTF-8 bytes of every record's texts."""
    import pyarrow.compute as pc

    if chunk.kind in ("documents", "labelled"):
        return pc.fill_null(pc.binary_length(chunk.rows["text"]), 0).to_pylist()  # type: ignore[no-any-return]
    return [size_of(record) for record in chunk.records]


def _tokens(chunk: Chunk, tokenizer: Path) -> list[int]:
    """Tokens of every record's texts."""
    several = [list(texts(record)) for record in chunk.records]
    with one_thread():
        counts = map(len, encode_all(plain_of(tokenizer), [text for some in several for text in some]))
        return [sum(next(counts) for _ in some) for some in several]


def _number(text: str | None) -> float:
    try:
        return float(text) if text is not None else float("nan")
    except ValueError:
        return float("nan")


def send(work: Sending) -> dict[str, Any]:
    """Write one row group's chosen texts, a batch for each bucket, sorted by place; unless it is done."""
    import pyarrow as pa
    import pyarrow.ipc as ipc

    def make(folder: Path) -> dict[str, Any]:
        order = np.argsort(work.places, kind="stable")
        table = work.rows.read(work.kind)
        if work.kind != work.to_kind:
            conversations = (record for record in Chunk(work.kind, table).records if isinstance(record, Conversation))
            table = Chunk.of(work.to_kind, map(as_document, conversations)).rows
        table = table.take(work.chosen[order])
        table = _labelled(table, work.source, work.epochs[order].tolist())
        table = table.append_column("place", pa.array(work.places[order])).combine_chunks()
        buckets, first = np.unique(work.buckets[order], return_index=True)
        borders = [*first.tolist(), len(order)]
        options = ipc.IpcWriteOptions(compression="lz4")
        with (
            pa.OSFile(str(folder / ROWS), "wb") as sink,
            ipc.new_file(sink, table.schema, options=options) as out,
        ):
            for number in range(len(buckets)):
                part = table.slice(borders[number], borders[number + 1] - borders[number])
                out.write_batch(part.combine_chunks().to_batches()[0])
        return {"buckets": buckets.tolist()}

    return made_once(work.folder, make)


def _labelled(table: pa.Table, source: str, epochs: Sequence[int]) -> pa.Table:
    """`source` is the mixture's name for where the text is from; the former one goes to `meta` as `origin`, and a text
    that is there again says so (`epoch: 2`)."""
    import pyarrow as pa

    meta = []
    for old, origin, epoch in zip(table["meta"].to_pylist(), table["source"].to_pylist(), epochs, strict=True):
        held = {item["key"]: item["value"] for item in old or []}
        if origin and origin != source:
            held.setdefault("origin", origin)
        if epoch:
            held["epoch"] = str(epoch + 1)
        meta.append([{"key": key, "value": held[key]} for key in sorted(held)])
    for name, values in (("meta", meta), ("source", [source] * len(meta))):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, type=table.schema.field(at).type))
    return table


def _gathered(parts: Sequence[tuple[Path, int]]) -> pa.Table:
    """One bucket's texts in their order."""
    import pyarrow as pa
    import pyarrow.ipc as ipc

    batches = []
    for folder, number in parts:
        with pa.OSFile(str(folder / ROWS)) as source:
            batches.append(ipc.open_file(source).get_batch(number))
    return pa.Table.from_batches(batches).sort_by("place").drop_columns(["place"])
