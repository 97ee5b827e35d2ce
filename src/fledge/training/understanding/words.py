"""Words and their tags: where a tagger's labels stand among the tokens, and how its tags become entities again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fledge.records.entities import Entity, from_tags
from fledge.training.understanding.examples import IGNORED, Encoder, Example

Align: TypeAlias = Literal["first", "last"]
_CJK = r"\u2e80-\u2fff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}_]+|\S")


@dataclass(frozen=True)
class Words:
    """A text cut where a tag may change: at white space and punctuation, and at every Chinese or Japanese character."""

    text: str
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, text: str) -> Words:
        return cls(text, tuple(match.span() for match in _WORD.finditer(text)))

    @property
    def spellings(self) -> list[str]:
        """The words, each with the one space before it where there is one: what a byte-level tokenizer expects."""
        return [
            (" " if start and self.text[start - 1].isspace() else "") + self.text[start:end]
            for start, end in self.places
        ]

    def tags(self, entities: Sequence[Entity]) -> list[str]:
        """B-, I- or O for every word. Of entities that overlap the longest is kept; one that begins or ends within
        a word takes the whole of it."""
        tags = ["O"] * len(self.places)
        for entity in sorted(entities, key=lambda e: (e.start - e.end, e)):
            inside = [i for i, (start, end) in enumerate(self.places) if start < entity.end and entity.start < end]
            if inside and all(tags[i] == "O" for i in inside):
                for position, i in enumerate(inside):
                    tags[i] = f"{'I' if position else 'B'}-{entity.type}"
        return tags

    def entities(self, tags: Sequence[str]) -> list[Entity]:
        """The entities that tags spell, in code points. Words beyond the tags have none."""
        return [Entity(self.places[e.start][0], self.places[e.end - 1][1], e.type) for e in from_tags(tags)]


def labels_of(types: Sequence[str]) -> list[str]:
    """`O`, and B- and I- of every type: the classes of a tagger, in order."""
    return ["O", *(f"{mark}-{kind}" for kind in sorted(set(types)) for mark in "BI")]


def aligned(encoder: Encoder, words: Words, align: Align) -> tuple[list[int], list[int | None]]:
    """Token ids, and for each token the word whose tag it carries (the first or the last of the word's tokens)."""
    ids, of = encoder.words(words.spellings)
    neighbours = [None, *of[:-1]] if align == "first" else [*of[1:], None]
    return ids, [
        word if word is not None and word != other else None for word, other in zip(of, neighbours, strict=True)
    ]


def tagged_example(
    encoder: Encoder, text: str, entities: Sequence[Entity], numbers: dict[str, int], align: Align
) -> Example:
    """A text's tokens with the number of a tag on one token of every word; tags that are not known count nothing."""
    words = Words.of(text)
    tags = words.tags(entities)
    ids, carries = aligned(encoder, words, align)
    return Example(ids, [IGNORED if word is None else numbers.get(tags[word], IGNORED) for word in carries])
