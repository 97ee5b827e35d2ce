"""Density: texts that say nothing new, and texts that are noise."""

from __future__ import annotations

from collections import Counter

from pydantic import Field

from fledge.data.chunk import Chunk
from fledge.data.steps.base import Refused, Rejected, Step
from fledge.data.steps.rules import Threshold, of_language
from fledge.data.texts import units

_LEAST: dict[str, float] = {"zh": 0.57}
_MOST: dict[str, float] = {}
_LEAST_DISTINCT: dict[str, float] = {"zh": 0.34}
_MOST_DISTINCT: dict[str, float] = {}


class Density(Step, name="density"):
    """Refuses texts that zlib squeezes much further than prose, or hardly at all, and texts of whose words too few, or
    nearly all, are different (the moving-average type-token ratio: Covington and McFall, 2010; see `data.density`)."""

    least: Threshold = Field(None, description="bytes zlib leaves, 1 being prose (0.6; zh 0.57)")
    most: Threshold = Field(None, description="the same, at most (1.6)")
    least_distinct: Threshold = Field(None, description="different units of 100 (0.4; zh 0.34)")
    most_distinct: Threshold = Field(None, description="the same, at most (0.985)")

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        from fledge.data.density import compressed, distinct

        refused: Refused = {}
        for row, (text, words) in enumerate(zip(chunk.texts, chunk.of_each(units), strict=True)):
            language = chunk.languages[row]
            density = compressed(text, language)
            if density < self._limit(self.least, language, 0.6, _LEAST):
                refused[row] = Rejected("says the same again and again", f"{density:.3f}")
            elif density > self._limit(self.most, language, 1.6, _MOST):
                refused[row] = Rejected("noise", f"{density:.3f}")
            else:
                share = distinct(words)
                if share < self._limit(self.least_distinct, language, 0.4, _LEAST_DISTINCT):
                    refused[row] = Rejected("few different words", f"{share:.3f}")
                elif len(words) >= 100 and share > self._limit(self.most_distinct, language, 0.985, _MOST_DISTINCT):
                    refused[row] = Rejected("no word twice", f"{share:.3f}")
        return chunk, refused

    @staticmethod
    def _limit(option: Threshold, language: str, usual: float, ours: dict[str, float]) -> float:
        said = of_language(option, language)
        return ours.get(language, usual) if said is None else float(said)
