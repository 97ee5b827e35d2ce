"""A trained classifier at work: labels and probabilities into `meta`, and rows refused by them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pydantic import Field, PrivateAttr, model_validator

from fledge.core.artifact import Classifier as ClassifierArtifact
from fledge.core.errors import FledgeError, Problem, did_you_mean
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.data.steps.base import Find, Refused, Rejected, Step

if TYPE_CHECKING:
    from fledge.data.chunk import Chunk
    from fledge.data.judges.classifier import Classifier


class Classify(Step, name="classify"):
    """What a classifier of ours says of each text (Joulin et al., 2017): the likeliest label into `meta` under `key`,
    its probability under `<key>_probability`. With `keep` a row stays when one of the labels there is probable enough,
    as the quality classifiers of GPT-3, DCLM and FineWeb-Edu choose documents (Brown et al., 2020; Li et al., 2024;
    Penedo et al., 2024)."""

    model: Ref[ClassifierArtifact] = Field(description="the classifier, as `classifier.train` makes it")
    keep: dict[str, float] = Field(
        default_factory=dict,
        description="{label: least probability}: a row stays when one of them holds; {} refuses none",
    )
    tag: bool = Field(True, description="write the label and its probability into meta")
    key: str = Field("label", min_length=1, description="under which key of meta: quality, topic")
    _classifier: Classifier | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _probabilities(self) -> Classify:
        for label, least in self.keep.items():
            if not 0 <= least <= 1:
                raise ValueError(f'the probability of "{label}" must lie between 0 and 1, not {least}')
        return self

    def start(self, find: Find) -> None:
        from fledge.data.judges.classifier import Classifier

        (folder,) = find(self.model)
        self._classifier = Classifier.load(folder)
        labels = self._classifier.labels
        for label in self.keep:
            if label not in labels:
                raise FledgeError(
                    Problem(
                        t('the classifier knows no label "{label}"', label=label),
                        where=self.model.text,
                        allowed=", ".join(labels),
                        fix=did_you_mean(label, labels),
                    )
                )

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        assert self._classifier is not None
        labels = self._classifier.labels
        says = self._classifier.probabilities(chunk.texts).tolist()
        best = [max(range(len(labels)), key=row.__getitem__) for row in says]
        refused: Refused = {}
        if self.keep:
            wanted = [(labels.index(label), least) for label, least in self.keep.items()]
            for at, row in enumerate(says):
                if not any(row[label] >= least for label, least in wanted):
                    value = ", ".join(f"{labels[label]} {row[label]:.3f}" for label, _ in wanted)
                    refused[at] = Rejected("no wanted label is probable enough", value)
        counts.update(f"{self.key}/{labels[label]}" for label in best)
        if self.tag:
            chunk = chunk.with_meta(self.key, [labels[label] for label in best])
            sure = [f"{row[label]:.3f}" for row, label in zip(says, best, strict=True)]
            chunk = chunk.with_meta(f"{self.key}_probability", sure)
        return chunk, refused
