"""Task `bits_per_byte`: how few bits a model needs for text that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fledge.core.artifact import Records
from fledge.core.intervals import ratio_interval
from fledge.core.job import Job
from fledge.core.reference import Ref
from fledge.core.units import Bytes
from fledge.evaluation.tasks.base import Conclusion, Item, Number, Paired, Task, Tell

if TYPE_CHECKING:
    from fledge.evaluation.subject import Subject


@dataclass(frozen=True)
class HeldOut:
    """The held-out texts of every language, and what the baselines need for them (bits per byte)."""

    texts: Mapping[str, list[str]]
    xz: Mapping[str, float]
    ngram: Mapping[str, float]


class BitsPerByte(Task):
    """Bits per byte of held-out text, by language: comparable across tokenizers, unlike perplexity.

    The same measure as `training.held_out.bits_per_byte`, through the engine: every token of every text once, long
    texts in windows that overlap by half. Beside it `xz -9` on the same bytes, and with `train` a byte n-gram model
    of the training text.
    """

    task: Literal["bits_per_byte"] = Field("bits_per_byte", description="compression of held-out text")
    data: dict[str, Ref[Records]] = Field(min_length=1, description="held-out text by language")
    train: dict[str, Ref[Records]] = Field({}, description="training text by language, for the n-gram baseline")
    bytes: Bytes = Field(100_000, ge=1, description="how much of each held-out text is measured, from the first on")

    def load(self, job: Job) -> HeldOut:
        from fledge.training.corpus import excerpt
        from fledge.training.held_out import xz_bits_per_byte
        from fledge.training.ngrams import ngram_bits_per_byte

        texts = {language: excerpt(job.open(ref), self.bytes, language) for language, ref in self.data.items()}
        joined = {language: "".join(found).encode() for language, found in texts.items()}
        xz = {language: xz_bits_per_byte(data) for language, data in joined.items()}
        ngram = {
            language: ngram_bits_per_byte("\n".join(excerpt(job.open(ref), 2**40)).encode(), joined[language])
            for language, ref in self.train.items()
            if language in joined
        }
        return HeldOut(texts, xz, ngram)

    def count(self, rows: HeldOut) -> int:
        return sum(map(len, rows.texts.values()))

    def tokens(self) -> float:
        return self.bytes * len(self.data) / 3

    def ask(self, rows: HeldOut, subject: Subject, seed: int, tell: Tell) -> list[Item]:
        return [item for language, texts in rows.texts.items() for item in _bits(texts, language, subject, tell)]

    def conclude(
        self, rows: HeldOut, answers: Mapping[str, list[Item]], roles: Mapping[str, str], seed: int
    ) -> Conclusion:
        models: dict[str, dict[str, Number]] = {model: {} for model in answers}
        paired = []
        for language in rows.texts:
            metric = self._metric(language)
            mine = {model: [i for i in items if i["language"] == language] for model, items in answers.items()}
            bits = {model: [i["bits"] for i in items] for model, items in mine.items()}
            sizes = {model: [i["bytes"] for i in items] for model, items in mine.items()}
            for model in answers:
                found = ratio_interval(bits[model], sizes[model], seed)
                models[model][metric] = found if found.n > 1 else found.value  # one text says nothing of others
            paired.append(Paired(metric, bits, sizes, proportion=False))
        baselines: dict[str, dict[str, Number]] = {
            name: {self._metric(language): value for language, value in found.items()}
            for name, found in (("xz", rows.xz), ("ngram", rows.ngram))
            if found
        }
        return Conclusion(models, baselines, tuple(paired))

    def _metric(self, language: str) -> str:
        return f"{self.key}_{language}"


def _bits(texts: list[str], language: str, subject: Subject, tell: Tell) -> Iterable[Item]:
    """Σ −log₂ p of every text, its tokens predicted from those before it in the same text."""
    from fledge.evaluation.subject import chunks
    from fledge.training.held_out import encode, separator_id, windows

    separator, window = separator_id(subject.tokenizer), subject.engine.context
    for some in chunks(zip(texts, encode(subject.tokenizer, texts), strict=True), 16):
        rows = [
            (index, list(ids[:start]), list(ids[start:]))
            for index, (_, tokens) in enumerate(some)
            for ids, start in windows([separator, *tokens], window, max(1, window // 2))
        ]
        scored = subject.score([prompt for _, prompt, _ in rows], [rest for _, _, rest in rows], lambda _: None)
        for index, (text, _) in enumerate(some):
            logprobs = [score.logprobs for (row, _, _), score in zip(rows, scored, strict=True) if row == index]
            nats = -math.fsum(value for found in logprobs for value in found)
            yield {
                "language": language,
                "bytes": len(text.encode()),
                "tokens": sum(map(len, logprobs)),
                "bits": nats / math.log(2),
            }
        tell(len(some))
