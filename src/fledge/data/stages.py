"""The stages of this floor: collect, refine, convert, split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from fledge.core.artifact import KINDS, Artifact, Records
from fledge.core.errors import Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref, Source
from fledge.core.stage import Estimate, Size, Stage
from fledge.core.units import Bytes, Count
from fledge.data.steps import DEFAULT, AnyStep, read_step


class Collect(Stage, use="data.collect", version=2):
    """Text from packages, files, folders, globs and URLs as records of one kind. What cannot be read is kept as
    rejected."""

    kind: Literal["documents", "conversations", "preferences", "labelled", "prompts"] = Field(
        description="what the records are"
    )
    sources: list[Source] = Field(
        min_length=1, description="package:NAME, files, folders, globs, URLs (s3://, https://), hub:OWNER/NAME@REVISION"
    )
    limit: Count | None = Field(
        None, ge=1, description="at most so many records of each source, chosen by a hash of their id"
    )
    max_row: Bytes = Field(32_000_000, ge=1_000, description="a longer row, page or book is set aside")
    code: bool = Field(False, description="every file is source code (as below a folder with .git): a document each")

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        return {"": KINDS[self.kind]}

    def run(self, job: Job) -> Records:
        from fledge.data.collect import collect
        from fledge.records.raw.rows import Limits

        found = [job.find(source) for source in self.sources]
        started = time.perf_counter()
        metrics = collect(job, found, self.kind, self.limit, Limits(row=self.max_row), self.code)
        job.events.metric("rate/data.collect", metrics["bytes"] / (time.perf_counter() - started))
        return _records(self.kind, job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        total = sum(sizes[source.text].bytes for source in self.sources if source.text in sizes) or 2e7
        seconds = total / machine.rate("data.collect", 3e6)
        rows = self.limit * len(self.sources) if self.limit else total / 800
        return Estimate(
            (0.3 * seconds, 2 + 2 * seconds), (0.2e9, 0.5e9 + 6 * min(total, 3e8)), total / 2, {"": Size(rows, total)}
        )


class Refine(Stage, use="data.refine", version=2):
    """Cleaning: a list of steps, in order. Every row refused is kept with the step, the reason and the value."""

    same_kind_as: ClassVar[str] = "data"

    data: Ref[Records] = Field(description="what to clean")
    steps: list[AnyStep] = Field(
        default_factory=lambda: [read_step(name) for name in DEFAULT],
        description=f"names of steps, or {{name: {{option: value}}}}; by default {', '.join(DEFAULT)}",
    )
    against: list[Ref[Records]] = Field(
        default_factory=list, description="corpora that came before: what they hold is a duplicate here"
    )
    keep_index: bool = Field(
        False, description="keep what was compared in the artifact, so that a later corpus is compared without reading"
    )

    def run(self, job: Job) -> Records:
        from fledge.data.refine import Refinery
        from fledge.records.shards import kind_in

        kind = kind_in(job.open(self.data))
        refinery = Refinery(job, kind, self.steps, self.keep_index)
        metrics = refinery.run(job.open(self.data), [job.open(ref) for ref in self.against])
        job.events.metric("rate/data.refine", metrics["bytes_per_second"])
        return _records(kind, job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        size = sizes.get(self.data.text) or Size(1e4, 1e7)
        seconds = 2 + size.bytes / machine.rate("data.refine", 2e6)
        memory = (0.3e9, 1e9 + 40 * size.rows)  # chunks pass through; a few bytes a row are kept to decide by
        return Estimate((0.5 * seconds, 2 + 2 * seconds), memory, size.bytes, {"": size})


class Split(Stage, use="data.split", version=1):
    """Held-out text: whole records, chosen by hash, by label or by date, with everything taken out that training nearly
    or fully repeats. Two parts (`train`, `held_out`), three (`validation` between them), or K folds: `train_1` to learn
    from and `1` to measure on, and so on."""

    same_kind_as: ClassVar[str] = "data"

    data: Ref[Records] = Field(description="what to split")
    held_out: Bytes = Field(
        100_000, ge=1, description="bytes of text to hold out of each language, a fifth of it at most"
    )
    validation: Bytes | None = Field(
        None, ge=1, description="as many bytes for a third part, validation, to choose settings and stop by"
    )
    folds: int | None = Field(
        None, ge=2, le=100, description="instead of parts, so many folds: every record is held out once (with time: "
        "each fold is trained on all that came before it)"
    )  # fmt: skip
    by: str = Field(
        "id", description="what stays together: id (each record by itself), or a key of meta, such as law_name"
    )
    stratify: str = Field(
        "", description="label, or a key of meta: each of its values gives its share to every part or fold"
    )
    time: str = Field("", description="a key of meta that holds a date: what is later is held out")

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        if self.folds:
            return {name: Records for k in range(1, self.folds + 1) for name in (str(k), f"train_{k}")}
        return dict.fromkeys(("train", *(["validation"] if self.validation else []), "held_out"), Records)

    def check(self) -> Iterator[Problem]:
        if self.folds and self.validation:
            yield Problem(t("folds have no validation part"), where="validation", fix=t("leave out one of the two"))
        if self.time and self.stratify:
            yield Problem(
                t("by date, parts cannot be given their share of every label as well"),
                where="stratify", fix=t("leave out one of the two"),
            )  # fmt: skip

    def run(self, job: Job) -> dict[str, Records]:
        from fledge.data.arrangement import Arrangement
        from fledge.data.folds import Folds
        from fledge.data.split import Splitter
        from fledge.records.shards import kind_in, read

        data, out = job.open(self.data), job.out
        kind = kind_in(data)
        started = time.perf_counter()
        arrangement = Arrangement(self.by, self.stratify, self.time)
        splitter = Splitter(
            lambda: read(data, kind), self.held_out, arrangement, job.rng_seed("split"), job.events.progress
        )
        if self.folds:
            metrics = Folds(splitter, self.folds).write(kind, out)
        elif self.validation:
            metrics = splitter.write_three(
                kind, out / "train", out / "validation", out / "held_out", self.validation
            )  # fmt: skip
        else:
            metrics = splitter.write(kind, out / "train", out / "held_out")
        job.events.metric("rate/data.split", sum(splitter.total.values()) / (time.perf_counter() - started))
        return {part: _records(kind, out / part, metrics) for part in self.output_kinds()}

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        size = sizes.get(self.data.text) or Size(1e4, 1e7)
        seconds = size.bytes / machine.rate("data.split", 1e6) * (self.folds or 1)
        memory, disk = (0.2e9, 0.5e9 + 10 * min(size.bytes, 6.4e7)), size.bytes * (self.folds or 1)
        parts = {name: self._part(name, size) for name in self.output_kinds()}
        return Estimate((0.3 * seconds, 2 + 2 * seconds), memory, disk, parts)

    def _part(self, name: str, whole: Size) -> Size:
        """How big a part will be, about."""
        if self.folds:
            share = 1 / self.folds if name.isdigit() else 1 - 1 / self.folds
            return Size(whole.rows * share, whole.bytes * share)
        if name == "train":
            return whole
        wanted = 2 * ((self.validation or 0) if name == "validation" else self.held_out)
        return Size(whole.rows * wanted / max(whole.bytes, 1), wanted)


class Convert(Stage, use="data.convert", version=1):
    """Records in another spelling: a file that other tools read, and that fledge reads back as it was. A record that
    the spelling cannot hold is kept as rejected."""

    data: Ref[Records] = Field(description="what to convert: any records, file or folder")
    to: Literal[
        "alpaca", "sharegpt", "messages", "preference", "ranking", "rating", "classification", "text", "prompt"
    ] = Field(description="the spelling; text takes conversations, too, as what was said in them")
    file: Literal["jsonl", "json", "csv", "parquet", "save_to_disk"] = Field(
        "jsonl", description="the kind of file; save_to_disk: a folder that the library datasets opens"
    )

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        from fledge.records.writers import KIND_OF_FORMAT

        return {"": KINDS[KIND_OF_FORMAT[self.to]]}

    def run(self, job: Job) -> Records:
        from fledge.data.convert import convert
        from fledge.records.writers import KIND_OF_FORMAT

        started = time.perf_counter()
        metrics = convert(job.open(self.data), self.to, job.out, self.file, job.events.progress)
        job.events.metric("rate/data.convert", metrics["bytes"] / (time.perf_counter() - started))
        return _records(KIND_OF_FORMAT[self.to], job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        size = sizes.get(self.data.text) or Size(1e4, 1e7)
        seconds = size.bytes / machine.rate("data.convert", 1e7)
        return Estimate((0.3 * seconds, 1 + 2 * seconds), (0.1e9, 0.4e9), 1.5 * size.bytes, {"": size})


def _records(kind: str, path: Any, metrics: dict[str, Any]) -> Records:
    """The artifact of a kind of records."""
    cls = KINDS.get(kind, Records)
    return cls(path, metrics) if issubclass(cls, Records) else Records(path, metrics)
