"""Harm: texts of hate, violence, sex, self-harm, gambling, fraud or drugs are refused, tagged or blotted."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PrivateAttr, field_validator

from fledge.core.artifact import Classifier as ClassifierArtifact
from fledge.core.errors import FledgeError, Problem, did_you_mean
from fledge.core.language import t
from fledge.core.reference import Ref, Source
from fledge.data.steps.base import Find, Refused, Rejected, Step
from fledge.data.texts import units

if TYPE_CHECKING:
    from fledge.data.chunk import Chunk
    from fledge.data.harm import Judge, Verdict
    from fledge.data.judges.classifier import Classifier

THRESHOLDS = {"en": 30.0, "zh": 30.0}


class Harm(Step, name="harm"):
    """Words of harm, disguised or not (C4, Raffel et al., 2020), weighed per 1,000 units in the light of what stands
    beside them; and where there is one a trained classifier (Dolma, Soldaini et al., 2024)."""

    action: Literal["reject", "tag", "mask"] = Field(
        "reject",
        description="reject: refuse the row; tag: score and categories into meta; mask: asterisks for the words",
    )
    threshold: dict[str, float] = Field(
        default_factory=lambda: dict(THRESHOLDS),
        description="score from which a text is harmful, by language; other languages take that of en",
    )
    words: list[Source] = Field(
        default_factory=list, description="more words: .json or .txt files, or folders of them named by language"
    )
    languages: tuple[str, ...] = Field(("en", "zh"), description="of `words` named by language, those that are read")
    pinyin: bool = Field(False, description="find Chinese words spelled in Latin letters as well")
    model: Ref[ClassifierArtifact] | None = Field(None, description="a classifier: classifier.train")
    label: str = Field("toxic", description="the classifier's label for harm")
    probability: float = Field(0.5, ge=0, le=1, description="of `label`, from which a text is harmful")

    _judge: Judge | None = PrivateAttr(None)
    _classifier: Classifier | None = PrivateAttr(None)

    @field_validator("threshold")
    @classmethod
    def _fill_in(cls, threshold: dict[str, float]) -> dict[str, float]:
        if wrong := [language for language, score in threshold.items() if score <= 0]:
            raise ValueError(f"the threshold of {wrong[0]} must be above 0")
        return {**THRESHOLDS, **threshold}

    def start(self, find: Find) -> None:
        from fledge.data.harm import Judge, Lexicon, read_words

        files = [file for source in self.words for file in find(source)]
        self._judge = Judge(Lexicon(read_words(files, self.languages) if files else (), self.pinyin))
        if self.model is not None:
            from fledge.data.judges.classifier import Classifier

            (folder,) = find(self.model)
            self._classifier = Classifier.load(folder)
            if self.label not in self._classifier.labels:
                labels = self._classifier.labels
                raise FledgeError(
                    Problem(
                        t('the classifier knows no label "{label}"', label=self.label),
                        where=self.model.text,
                        allowed=", ".join(labels),
                        fix=did_you_mean(self.label, labels),
                    )
                )

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        assert self._judge is not None
        lengths = map(len, chunk.of_each(units))
        verdicts = list(map(self._judge, chunk.texts, lengths))
        says = self._probabilities(chunk)
        refused: Refused = {}
        for row, (verdict, language, said) in enumerate(zip(verdicts, chunk.languages, says, strict=True)):
            if harmful := self._why(verdict, language, said):
                counts[f"harm/{next(iter(verdict.categories), self.label)}"] += 1
                refused[row] = harmful
        if self.action == "mask":
            return self._masked(chunk, counts), {}
        if self.action == "tag":
            return self._tagged(chunk, verdicts, says), {}
        return chunk, refused

    def _probabilities(self, chunk: Chunk) -> list[float]:
        """Of harm, by the classifier; 0 without one."""
        if self._classifier is None:
            return [0.0] * len(chunk)
        return [said[self.label] for said in self._classifier.predict(chunk.texts)]

    def _why(self, verdict: Verdict, language: str, said: float) -> Rejected | None:
        if verdict.score >= self.threshold.get(language, self.threshold["en"]):
            words = ", ".join(verdict.words[:5])
            return Rejected(f"words of {next(iter(verdict.categories))}", f"score {verdict.score:.1f}: {words}")
        if self._classifier is not None and said >= self.probability:
            return Rejected(f"classified as {self.label}", f"{said:.3f}")
        return None

    def _tagged(self, chunk: Chunk, verdicts: list[Verdict], says: list[float]) -> Chunk:
        """`meta.harm` is the score, `harm_categories` what it consists of, `harm_probability` the classifier's."""
        chunk = chunk.with_meta("harm", [f"{verdict.score:.1f}" for verdict in verdicts])
        chunk = chunk.with_meta("harm_categories", [",".join(verdict.categories) for verdict in verdicts])
        return chunk if self._classifier is None else chunk.with_meta("harm_probability", [f"{p:.3f}" for p in says])

    def _masked(self, chunk: Chunk, counts: Counter[str]) -> Chunk:
        """Asterisks for every word that counts, also in texts below the threshold."""
        from fledge.data.harm import blot

        assert self._judge is not None
        lexicon = self._judge.lexicon

        def change(text: str, language: str) -> str:
            hits = lexicon.hits(text)
            counts["harm/words"] += len(hits)
            return blot(text, hits)

        return chunk.map_texts(change)
