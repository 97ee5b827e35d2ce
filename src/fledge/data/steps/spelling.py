"""Mistakes of spelling and grammar per 1,000 units, by what a reference corpus knows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pydantic import Field, PrivateAttr

from fledge.core.artifact import NGram
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.data.chunk import Chunk
from fledge.data.steps.base import Find, Refused, Rejected, Step
from fledge.data.texts import units

if TYPE_CHECKING:
    from fledge.data.judges.spelling import Speller


class Spelling(Step, name="spelling"):
    """Unknown words one edit from a frequent one (Damerau, 1964), wrong articles, doubled words, missing capitals;
    Chinese look-alikes and homophones in unlikely places, doubled particles, mixed punctuation (`judges.spelling`).
    Their number per 1,000 words or Chinese characters goes into `meta.spelling`; above `max` a text is refused."""

    model: Ref[NGram] = Field(description="an n-gram model of clean reference text, its units words")
    max: dict[str, float] = Field(
        default_factory=dict, description="{language: most mistakes per 1,000 units}: en, zh; others are not judged"
    )
    frequent: int = Field(20, ge=2, description="how often the word that is meant stands in the reference")
    margin: float = Field(8.0, gt=0, description="ln of how much likelier another character must be")
    least: int = Field(50, ge=1, description="units; shorter texts are measured and never refused")
    _speller: Speller | None = PrivateAttr(None)

    def start(self, find: Find) -> None:
        from fledge.data.judges.ngram_model import NGramModel
        from fledge.data.judges.spelling import Speller

        (folder,) = find(self.model)
        model = NGramModel.load(folder)
        if model.notes.unit != "words":
            raise FledgeError(
                Problem(
                    t("spelling needs an n-gram model whose units are words"),
                    where=self.model.text,
                    found=model.notes.unit,
                    allowed="words",
                )
            )
        self._speller = Speller(model, self.frequent, self.margin)

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        assert self._speller is not None
        words, languages = chunk.of_each(units), chunk.languages
        found = self._speller.count(chunk.texts, words, languages)
        rates = [""] * len(chunk)
        refused: Refused = {}
        for row, (wrong, language) in enumerate(zip(found, languages, strict=True)):
            if language not in ("en", "zh"):
                continue
            rate = 1_000 * wrong.total() / max(1, len(words[row]))
            rates[row] = f"{rate:.1f}"
            counts.update({f"spelling/{kind}": n for kind, n in wrong.items()})
            if rate > self.max.get(language, float("inf")) and len(words[row]) >= self.least:
                worst = ", ".join(f"{kind} {n}" for kind, n in wrong.most_common())
                refused[row] = Rejected("spelling", f"{rates[row]} ({worst})")
        return chunk.with_meta("spelling", rates), refused
