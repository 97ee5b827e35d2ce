"""The stages of this floor: collect, refine, split, train a tokenizer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from fledge.core.artifact import KINDS, Artifact, Records, Tokenizer
from fledge.core.job import Job
from fledge.core.reference import Ref, Source
from fledge.core.stage import Estimate, Size, Stage
from fledge.core.units import Bytes, Count
from fledge.data.steps import DEFAULT, AnyStep, read_step


class Collect(Stage, use="data.collect", version=1):
    """Text from packages, files, folders and globs as records of one kind. What cannot be read is kept as rejected."""

    kind: Literal["documents", "conversations", "preferences", "labelled", "prompts"] = Field(
        description="what the records are"
    )
    sources: list[Source] = Field(
        min_length=1, description="package:NAME, files, folders, globs, hub:OWNER/NAME@REVISION"
    )
    limit: Count | None = Field(
        None, ge=1, description="at most so many records of each source, chosen by a hash of their id"
    )

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        return {"": KINDS[self.kind]}

    def run(self, job: Job) -> Records:
        from fledge.data.collect import collect

        found = [job.find(source) for source in self.sources]
        started = time.perf_counter()
        metrics = collect(found, self.kind, self.limit, job.rng_seed("collect"), job.out, job.events)
        job.events.metric("rate/data.collect", metrics["bytes"] / (time.perf_counter() - started))
        return _records(self.kind, job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        total = sum(sizes[source.text].bytes for source in self.sources if source.text in sizes) or 2e7
        seconds = total / machine.rate("data.collect", 3e6)
        rows = self.limit * len(self.sources) if self.limit else total / 800
        return Estimate(
            (0.3 * seconds, 2 + 2 * seconds), (0.2e9, 0.3e9 + 6 * total), total / 2, {"": Size(rows, total)}
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

    def run(self, job: Job) -> Records:
        from fledge.data.refine import Refinery
        from fledge.records.shards import kind_in

        kind = kind_in(job.open(self.data))
        metrics = Refinery(job, kind, self.steps).run(job.open(self.data), [job.open(ref) for ref in self.against])
        job.events.metric("rate/data.refine", metrics["bytes_per_second"])
        return _records(kind, job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        size = sizes.get(self.data.text) or Size(1e4, 1e7)
        seconds = size.bytes / machine.rate("data.refine", 0.5e6)
        memory = (0.2e9 + 2 * size.bytes, 0.4e9 + 10 * size.bytes)
        return Estimate((0.5 * seconds, 2 + 2 * seconds), memory, size.bytes, {"": size})


class Split(Stage, use="data.split", version=1):
    """Held-out text: whole records, chosen by hash, with everything taken out that training nearly or fully repeats."""

    outputs: ClassVar = {"train": Records, "held_out": Records}
    same_kind_as: ClassVar[str] = "data"

    data: Ref[Records] = Field(description="what to split")
    held_out: Bytes = Field(
        100_000, ge=1, description="bytes of text to hold out of each language, a fifth of it at most"
    )
    by: str = Field(
        "id", description="what stays together: id (each record by itself), or a key of meta, such as law_name"
    )

    def run(self, job: Job) -> dict[str, Records]:
        from fledge.data.split import Splitter
        from fledge.records.shards import kind_in, read

        data = job.open(self.data)
        kind = kind_in(data)
        started = time.perf_counter()
        seed, progress = job.rng_seed("split"), job.events.progress
        splitter = Splitter(lambda: read(data, kind), self.held_out, self.by, seed, progress)
        metrics = splitter.write(kind, job.out / "train", job.out / "held_out")
        job.events.metric("rate/data.split", sum(splitter.total.values()) / (time.perf_counter() - started))
        return {part: _records(kind, job.out / part, metrics) for part in ("train", "held_out")}

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        size = sizes.get(self.data.text) or Size(1e4, 1e7)
        seconds = size.bytes / machine.rate("data.split", 1e6)
        parts = {"train": size, "held_out": Size(size.rows * 2 * self.held_out / max(size.bytes, 1), 2 * self.held_out)}
        return Estimate(
            (0.3 * seconds, 2 + 2 * seconds), (0.2e9, 0.5e9 + 10 * min(size.bytes, 6.4e7)), size.bytes, parts
        )


class TrainTokenizer(Stage, use="tokenizer.train", version=1):
    """A byte-level BPE tokenizer for English and Chinese, with special tokens and a chat template."""

    data: list[Ref[Records]] = Field(min_length=1, description="text to train on")
    algorithm: Literal["bpe"] = Field("bpe", description="byte-level BPE; it repeats bit for bit")
    vocab_size: Count = Field(4096, ge=261, description="entries, the 256 bytes and 4 special tokens included")
    sample: Bytes = Field(8_000_000, ge=1, description="about so many bytes of text, from every input in proportion")

    def run(self, job: Job) -> Tokenizer:
        from fledge.data.tokenizer import train_tokenizer

        started = time.perf_counter()
        metrics = train_tokenizer([job.open(ref) for ref in self.data], self.vocab_size, self.sample, job.out)
        job.events.metric("rate/tokenizer.train", metrics["trained_on_bytes"] / (time.perf_counter() - started))
        return Tokenizer(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        total = min(sum(sizes[ref.text].bytes for ref in self.data if ref.text in sizes) or 1e7, self.sample)
        seconds = total / machine.rate("tokenizer.train", 1.2e6)
        return Estimate(
            (0.5 * seconds, 2 + 2 * seconds), (0.3e9, 0.5e9 + 30 * total), 2e6, {"": Size(tokens=self.vocab_size)}
        )


def _records(kind: str, path: Any, metrics: dict[str, Any]) -> Records:
    """The artifact of a kind of records."""
    cls = KINDS.get(kind, Records)
    return cls(path, metrics) if issubclass(cls, Records) else Records(path, metrics)
