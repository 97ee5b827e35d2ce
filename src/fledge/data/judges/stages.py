"""The stages that train small models which judge text, and the one that looks for evaluation items in training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from fledge.core.artifact import Artifact, Classifier, Contamination, Labelled, NGram, Records, Tokenizer
from fledge.core.errors import Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.stage import Estimate, Size, Stage
from fledge.core.units import Bytes, Count
from fledge.data.steps.decontaminate import Decontaminate, Overlap


class TrainNGram(Stage, use="ngram.train", version=1):
    """An n-gram language model of reference texts: modified Kneser–Ney (Chen and Goodman, 1999). What `perplexity` and
    `spelling` measure by."""

    data: list[Ref[Records]] = Field(min_length=1, description="the reference: text of the kind that is wanted")
    order: int = Field(4, ge=1, le=7, description="units in the longest n-gram")
    unit: Literal["words", "bytes", "tokens"] = Field(
        "words", description="words and single unspaced characters, UTF-8 bytes, or a tokenizer's tokens"
    )
    tokenizer: Ref[Tokenizer] | None = Field(None, description="whose tokens, where they are the units")
    min_count: int = Field(2, ge=1, description="a unit that is seldomer is unknown")
    prune_from: int = Field(3, ge=0, description="n-grams of so many units and more that occur once go; 0 keeps all")
    sample: Bytes = Field(64_000_000, ge=1, description="about so many bytes of text, from every input in proportion")
    held_out: float = Field(0.02, ge=0, lt=0.5, description="share of the texts on which its perplexity is measured")

    def check(self) -> Iterator[Problem]:
        if (self.unit == "tokens") != (self.tokenizer is not None):
            yield Problem(t("the units are tokens exactly where a tokenizer is named"), fix=t("give both, or neither"))

    def run(self, job: Job) -> NGram:
        from fledge.data.judges.kneser_ney import train_ngram
        from fledge.data.judges.ngram_model import Segmenter

        tokenizer = job.open(self.tokenizer).path / "tokenizer.json" if self.tokenizer else None
        metrics = train_ngram(
            [job.open(ref) for ref in self.data],
            Segmenter(self.unit, tokenizer),
            job.out,
            order=self.order,
            min_count=self.min_count,
            prune_from=self.prune_from,
            sample=self.sample,
            held_out=self.held_out,
            tell=job.events.progress,
        )
        return NGram(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        total = sum((sizes.get(ref.text) or Size(bytes=1e7)).bytes for ref in self.data)
        taken = min(total, self.sample)
        units = taken / (1 if self.unit == "bytes" else 4)
        seconds = 1 + total / 3e7 + taken / 1e7 + units * self.order / 1.5e6
        return Estimate((0.3 * seconds, 2 * seconds), (0.2e9, 0.3e9 + 40 * units * self.order), 6 * units)


class TrainClassifier(Stage, use="classifier.train", version=1):
    """A linear classifier of texts over hashed n-grams (fastText's idea, Joulin et al., 2017), calibrated, with its
    numbers on held-out rows: from labelled rows, or from good and bad corpora as DCLM and FineWeb-Edu do."""

    data: list[Ref[Labelled]] = Field(default_factory=list, description="labelled rows to learn from")
    positive: list[Ref[Records]] = Field(default_factory=list, description="corpora whose rows are all `positive`")
    negative: list[Ref[Records]] = Field(default_factory=list, description="corpora whose rows are all `negative`")
    held_out: float = Field(0.1, gt=0, lt=0.5, description="share of the rows on which it is measured")
    calibrate: float = Field(0.1, gt=0, lt=0.5, description="share of the rows that choose epoch and temperature")
    by: str = Field("text", description="what stays together: text (equal texts), or a key of meta, such as law_name")
    limit: Count = Field(20_000, ge=20, description="rows of a label at most, chosen by hash")
    balance: bool | None = Field(
        None, description="as many rows of each label as the rarest has; by default for positive and negative corpora"
    )
    characters: Count = Field(2_000, ge=16, description="how much of a text is looked at: its beginning")
    bits: int = Field(18, ge=10, le=24, description="2^bits buckets for the n-grams' hashes")
    epochs: int = Field(8, ge=1, description="passes over the rows at most; the best is kept")
    lr: float = Field(0.5, gt=0, description="AdaGrad's learning rate")

    def check(self) -> Iterator[Problem]:
        if bool(self.data) == bool(self.positive or self.negative) or bool(self.positive) != bool(self.negative):
            yield Problem(
                t("a classifier learns from labelled rows, or from positive and negative corpora"),
                fix=t("give `data`, or both `positive` and `negative`"),
            )

    def run(self, job: Job) -> Classifier:
        from fledge.data.judges.classifier import Features, Settings
        from fledge.data.judges.classifier_training import train_classifier

        named = {"": self.data, "positive": self.positive, "negative": self.negative}
        metrics = train_classifier(
            [(job.open(ref), label) for label, refs in named.items() for ref in refs],
            Features(bits=self.bits, longest=self.characters),
            Settings(self.epochs, self.lr, job.rng_seed("classifier")),
            job.out,
            by=self.by,
            limit=self.limit,
            balance=bool(self.positive) if self.balance is None else self.balance,
            held_out=self.held_out,
            calibrate=self.calibrate,
            tell=job.events.progress,
        )
        return Classifier(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        given = [sizes.get(ref.text) or Size(1e4, 1e7) for ref in (*self.data, *self.positive, *self.negative)]
        rows = min(sum(size.rows for size in given), 4 * self.limit)
        features = rows * 1.5 * self.characters
        seconds = 2 + sum(size.bytes for size in given) / 2e7 + features / 1e7 * (1 + self.epochs / 3)
        return Estimate((0.2 * seconds, 2 * seconds), (0.2e9, 0.3e9 + 24 * features), 2.0**self.bits * 4 * 4)


class FindContamination(Overlap, Stage, use="data.contamination", version=1):
    """Which evaluation items stand in a corpus, in which documents and how much of them (Brown et al., 2020, appendix
    C): a report, and what `evaluate` needs to show clean and contaminated scores apart."""

    data: Ref[Records] = Field(description="the corpus")
    tasks: list[Ref[Artifact]] = Field(
        min_length=1, description="the evaluation items: package:NAME, files and folders, or records of a stage"
    )

    def run(self, job: Job) -> Contamination:
        from fledge.data.decontamination.report import examine

        step = Decontaminate(items=self.tasks, **{name: getattr(self, name) for name in Overlap.model_fields})
        return Contamination(job.out, examine(job, job.open(self.data), step))

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        size = sizes.get(self.data.text) or Size(1e4, 1e7)
        seconds = 3 + size.bytes / 3e6
        return Estimate((0.3 * seconds, 2 * seconds), (0.3e9, 1.5e9), 1e6 + 0.02 * size.bytes)
