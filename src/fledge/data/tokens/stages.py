"""The stages between clean text and training: mix, chunk, train a tokenizer, report on tokenizers, pack."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from fledge.core.artifact import KINDS, Artifact, Documents, Records, Tokenizer, Tokens
from fledge.core.errors import Problem, listing
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.stage import Config, Estimate, Size, Stage
from fledge.core.units import Bytes, Count

Genre = Literal["web", "books", "papers", "news", "reference", "code", "forums"]
Tier = Literal["human", "synthetic", "web"]


class MixSource(Config):
    """One source of a mixture. A reference alone will do: `web: crawl`."""

    data: Ref[Records] = Field(description="what it holds")
    weight: float | None = Field(None, gt=0, description="its weight among the sources; by default what it holds")
    epochs: float | None = Field(None, gt=0, description="so many passes over it, whatever the weights: 0.5, 2")
    genre: Genre | None = Field(None, description="what a preset knows it by")
    tier: Tier | None = Field(None, description="how its text came about: its weight is multiplied by the tier's")

    @model_validator(mode="before")
    @classmethod
    def _data_alone(cls, value: object) -> object:
        return value if isinstance(value, dict) else {"data": value}


class Curriculum(Config):
    """Easy texts first, or hard ones: each source's texts of each language ranked by a score."""

    by: str = Field("length", description="length, or the key of a number in meta, such as perplexity")
    order: Literal["rising", "falling"] = Field("rising", description="whether the score rises or falls")
    buckets: int = Field(10, ge=1, description="parts of equal size; inside one the order is random")


class Mix(Stage, use="data.mix", version=1):
    """Sources mixed by weight, temperature or epochs into one shuffled corpus of an exact size, out of core."""

    sources: dict[str, MixSource] = Field(min_length=1, description="name of a source: {data, weight or epochs, …}")
    preset: Literal["gpt3", "llama", "balanced"] | None = Field(
        None, description="weights by genre: as GPT-3's or LLaMA's data, or balanced"
    )
    tiers: dict[Tier, float] = Field(
        default_factory=lambda: {"human": 3.0, "synthetic": 1.0, "web": 1.0},
        description="what the weight of a source of each tier is multiplied by",
    )
    temperature: float = Field(1.0, gt=0, description="shares follow weight^(1/temperature): above 1 small ones gain")
    max_epochs: float | None = Field(None, gt=0, description="no weighted source is read more often than this")
    bytes: Bytes | None = Field(None, ge=1, description="size of the mixture in bytes of text")
    tokens: Count | None = Field(None, ge=1, description="size of the mixture in tokens; needs a tokenizer")
    tokenizer: Ref[Tokenizer] | None = Field(None, description="measures the sources in its tokens, not in bytes")
    curriculum: Curriculum | None = Field(None, description="an order by difficulty; without it the order is random")

    @property
    def budget(self) -> int | None:
        """The size asked for, in tokens where there is a tokenizer, else in bytes."""
        return self.tokens if self.tokenizer else self.bytes

    def check(self) -> Iterator[Problem]:
        if self.tokens and not self.tokenizer:
            yield Problem(t("a size in tokens needs a tokenizer"), fix="tokenizer: …")
        if self.bytes and self.tokenizer:
            yield Problem(t("with a tokenizer the size of the mixture is given in tokens"), fix="tokens: …")
        for name in self.sources:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                yield Problem(t("a source's name is made of letters, digits, - and _"), found=name)
        yield from self._check_weights()

    def _check_weights(self) -> Iterator[Problem]:
        both = [name for name, s in self.sources.items() if s.weight is not None and s.epochs is not None]
        if both:
            yield Problem(t("a source has a weight or epochs, not both"), found=listing(both))
        if missing := set(get_args(Tier)) - set(self.tiers):
            yield Problem(t("every tier needs a factor"), found=listing(sorted(missing)))
        weighted = {name: s for name, s in self.sources.items() if s.epochs is None}
        if self.preset:
            from fledge.data.mixing.shares import PRESETS

            known = PRESETS[self.preset]
            unknown = [name for name, s in weighted.items() if s.weight is None and s.genre not in known]
            if unknown:
                yield Problem(
                    t("the preset {preset} has no weight for these sources", preset=self.preset),
                    found=listing(unknown),
                    allowed=f"genre: {listing(sorted(known))}",
                    fix=t("give them a genre that it knows, a weight, or epochs"),
                )
        elif 0 < sum(s.weight is not None for s in weighted.values()) < len(weighted):
            without = [name for name, s in weighted.items() if s.weight is None]
            yield Problem(t("either every source has a weight (or epochs), or none has"), found=listing(without))

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        return {"": Records}

    def run(self, job: Job) -> Records:
        from fledge.data.mixing.mixer import Mixer

        started = time.perf_counter()
        kind, metrics = Mixer(self, job).run()
        job.events.metric("rate/data.mix", metrics["bytes"] / (time.perf_counter() - started))
        return KINDS[kind](job.out, metrics)  # type: ignore[return-value]

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        held = sum(sizes[s.data.text].bytes for s in self.sources.values() if s.data.text in sizes) or 1e7
        total = self.bytes or 4 * (self.tokens or 0) or held
        seconds = (held + total) / machine.rate("data.mix", 4e6)
        return Estimate((0.5 * seconds, 2 + 2 * seconds), (0.3e9, 1e9), 2 * total, {"": Size(total / 800, total)})


class ChunkDocuments(Stage, use="data.chunk", version=1):
    """Long documents cut before headings, between paragraphs, sentences or words; short ones stay as they are."""

    data: Ref[Records] = Field(description="documents, or conversations read as text")
    size: Count = Field(ge=1, description="how long a piece may be")
    by: Literal["units", "tokens", "characters"] = Field(
        "units", description="units are words and characters of unspaced scripts; tokens need a tokenizer"
    )
    tokenizer: Ref[Tokenizer] | None = Field(None, description="whose tokens are counted")
    overlap: Count = Field(0, ge=0, description="how much of a piece's end stands in the next one again, at most")

    def check(self) -> Iterator[Problem]:
        if self.overlap * 2 >= self.size and self.overlap:
            yield Problem(t("the overlap must be less than half of a piece"), found=str(self.overlap))
        if (self.by == "tokens") != (self.tokenizer is not None):
            yield Problem(t("pieces are measured in tokens by a tokenizer"), fix="by: tokens, tokenizer: …")

    def run(self, job: Job) -> Documents:
        from fledge.data.mixing.chunking import chunk_corpus

        started = time.perf_counter()
        tokenizer = job.open(self.tokenizer).path if self.tokenizer else None
        metrics = chunk_corpus(job.open(self.data), self.size, self.overlap, self.by, tokenizer, job)
        job.events.metric("rate/data.chunk", metrics["bytes"] / (time.perf_counter() - started))
        return Documents(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        size = sizes.get(self.data.text) or Size(1e4, 1e7)
        seconds = size.bytes / machine.rate("data.chunk", 3e6)
        return Estimate((0.5 * seconds, 2 + 2 * seconds), (0.2e9, 0.8e9), size.bytes, {"": size})


class Pack(Stage, use="data.pack", version=2):
    """Texts as token ids in rows of one length, each document whole where it fits: ready to train on."""

    data: list[Ref[Records]] = Field(min_length=1, description="documents, or conversations read as text")
    tokenizer: Ref[Tokenizer] = Field(description="how text becomes tokens")
    seq_len: int = Field(2048, ge=8, description="tokens a row")
    strategy: Literal["best_fit", "concatenate"] = Field(
        "best_fit", description="best_fit cuts only documents longer than a row; concatenate fills every row"
    )
    shard: Count = Field(64_000_000, ge=1000, description="tokens a shard, about; memory is ten times that in bytes")

    def run(self, job: Job) -> Tokens:
        from fledge.data.tokens.packer import pack

        started = time.perf_counter()
        data = [job.open(ref) for ref in self.data]
        metrics = pack(data, job.open(self.tokenizer).path, self.seq_len, self.strategy, self.shard, job)
        job.events.metric("rate/data.pack", metrics["bytes"] / (time.perf_counter() - started))
        return Tokens(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        total = sum(sizes[ref.text].bytes for ref in self.data if ref.text in sizes) or 1e7
        seconds = total / machine.rate("data.pack", 2e6)
        tokens = total / 3.5
        memory = 0.3e9 + 10 * min(self.shard, tokens)
        made = Size(tokens / self.seq_len, total, tokens)
        return Estimate((0.5 * seconds, 2 + 2 * seconds), (0.5 * memory, 2 * memory), 7 * tokens, {"": made})


class TrainTokenizer(Stage, use="tokenizer.train", version=2):
    """A tokenizer for English and Chinese with special tokens and a chat template, and a report on it."""

    data: list[Ref[Records]] = Field(min_length=1, description="text to train on")
    algorithm: Literal["bpe", "unigram", "wordpiece"] = Field(
        "bpe", description="byte-level BPE; Unigram with bytes to fall back to; WordPiece (not every text comes back)"
    )
    vocab_size: Count = Field(4096, ge=261, description="entries, special tokens and the 256 bytes included")
    sample: Bytes = Field(8_000_000, ge=1, description="about so many bytes of text, from every input in proportion")
    normalizer: Literal["none", "nfc", "nfkc", "lowercase"] = Field(
        "none", description="what is done to a text first; lowercase is NFKC in small letters"
    )
    special_tokens: list[str] = Field(
        default_factory=list, description="more special tokens, beside end of text, start and end of a turn, padding"
    )
    objective: Literal["causal", "masked", "replaced_token", "span_corruption", "denoising"] = Field(
        "causal", description="what it is for: a mask, or 100 sentinels for spans, are then among its special tokens"
    )

    @property
    def marks(self) -> int:
        """How many special tokens the objective brings."""
        return {"causal": 0, "span_corruption": 100}.get(self.objective, 1)

    def check(self) -> Iterator[Problem]:
        own = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<unk>", "[UNK]")
        own += ("[MASK]",) if self.marks == 1 else ()
        taken = [token for token in self.special_tokens if token in own]
        plain = [token for token in self.special_tokens if not re.fullmatch(r"(?=.*\w)(?=.*[^\w\s])\S+", token)]
        if plain:  # pieces of text could then be taken for it
            yield Problem(t("a special token has a letter, a sign and no space, as <|tool|> has"), found=listing(plain))
        if taken or len(set(self.special_tokens)) < len(self.special_tokens):
            yield Problem(t("special tokens must be new and differ"), found=listing(taken or self.special_tokens))
        least = 261 + self.marks + len(self.special_tokens)
        if self.vocab_size < least:
            yield Problem(
                t("the vocabulary is too small for the bytes and the special tokens"),
                found=str(self.vocab_size),
                allowed=f"≥ {least}",
            )

    def run(self, job: Job) -> Tokenizer:
        from fledge.data.tokens.tokenizer import train_tokenizer

        started = time.perf_counter()
        metrics = train_tokenizer([job.open(ref) for ref in self.data], self, job.out)
        job.events.metric("rate/tokenizer.train", metrics["trained_on_bytes"] / (time.perf_counter() - started))
        return Tokenizer(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        total = min(sum(sizes[ref.text].bytes for ref in self.data if ref.text in sizes) or 1e7, self.sample)
        seconds = total / machine.rate("tokenizer.train", 1.2e6 if self.algorithm == "bpe" else 0.2e6)
        return Estimate(
            (0.5 * seconds, 2 + 2 * seconds), (0.3e9, 0.5e9 + 30 * total), 2e6, {"": Size(tokens=self.vocab_size)}
        )


class ReportTokenizers(Stage, use="tokenizer.report", version=1):
    """Tokenizers side by side on one text: bytes a token, tokens a word or Chinese character, unknown tokens."""

    tokenizers: dict[str, Ref[Tokenizer]] = Field(
        min_length=1, description="name: tokenizer, such as ours: tokenizer, qwen: models/qwen3"
    )
    data: list[Ref[Records]] = Field(min_length=1, description="text to measure on; text not trained on is best")
    sample: Bytes = Field(4_000_000, ge=1, description="about so many bytes of it")
    cached: bool = Field(
        False, description="also GPT-2's and Qwen's where this machine has them: the report then depends on the machine"
    )

    def run(self, job: Job) -> Artifact:
        from fledge.data.tokens.tokenizer_report import report

        named = {name: job.open(ref).path for name, ref in self.tokenizers.items()}
        return Artifact(job.out, report(named, [job.open(ref) for ref in self.data], self.sample, self.cached, job))

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        seconds = self.sample * len(self.tokenizers) / machine.rate("tokenizer.report", 1e6)
        return Estimate((0.3 * seconds, 3 + 2 * seconds), (0.3e9, 0.5e9 + 10 * self.sample), 1e4)
