"""What is marked in a text: names, places, anything with a beginning, an end and a type.

A `Labelled` text carries its entities in `meta["entities"]`, as JSON: `[{"start": 0, "end": 2, "type": "PER", "text":
"张三"}]`, offsets in code points, the end exclusive. The words stand beside the offsets so that a text that was changed
afterwards is recognised: its offsets would point elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.records.kinds import Labelled

KEY = "entities"
_TIGHT = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")
"""Characters beside which no space is written: Chinese, Japanese, Korean, full-width signs."""


@dataclass(frozen=True, order=True)
class Entity:
    """`text[start:end]` is of a `type`."""

    start: int
    end: int
    type: str


def marked(text: str, entities: Iterable[Entity], **common: Any) -> Labelled:
    """A text with its entities. Raises FledgeError for one that does not lie within the text."""
    found = sorted(entities)
    for entity in found:
        if not 0 <= entity.start < entity.end <= len(text) or not entity.type:
            raise FledgeError(
                Problem(
                    t("an entity does not lie within its text"),
                    found=f"{entity.type!r}: {entity.start}–{entity.end}",
                    allowed=f"0–{len(text)}",
                )
            )
    told = [{**asdict(entity), "text": text[entity.start : entity.end]} for entity in found]
    meta = {**common.pop("meta", {}), KEY: json.dumps(told, ensure_ascii=False)}
    return Labelled(text, "", meta=meta, **common)


def entities_of(record: Labelled) -> list[Entity] | None:
    """The entities of a text, in order; None where it has none marked, or where they no longer fit its words."""
    try:
        rows = json.loads(record.meta[KEY])
        found = [Entity(int(row["start"]), int(row["end"]), str(row["type"])) for row in rows]
        words = [row.get("text", record.text[e.start : e.end]) for row, e in zip(rows, found, strict=True)]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    fits = all(
        0 <= e.start < e.end <= len(record.text) and e.type and record.text[e.start : e.end] == word
        for e, word in zip(found, words, strict=True)
    )
    return sorted(found) if fits else None


def joined(tokens: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Words as a text, and where each stands in it: a space between two unless one of them is written without."""
    text, places = "", []
    for token in tokens:
        if text and token and not (_TIGHT.match(token) or _TIGHT.match(text[-1])):
            text += " "
        places.append((len(text), len(text) + len(token)))
        text += token
    return text, places


def from_tags(tags: Sequence[str]) -> list[Entity]:
    """Entities of words tagged B-, I- (also E-, S-, L-, U-) and O: `start` and `end` count words.

    An I- that continues nothing of its type begins an entity, as in conlleval (Tjong Kim Sang and Buchholz, 2000).
    """
    found: list[Entity] = []
    start, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        mark, _, of = tag.partition("-")
        goes_on = bool(kind) and of == kind and mark in ("I", "E", "L", "M")
        if kind and not goes_on:
            found.append(Entity(start, index, kind))
            kind = ""
        if not goes_on and mark != "O":
            start, kind = index, of
        if kind and mark in ("E", "L", "S", "U"):
            found.append(Entity(start, index + 1, kind))
            kind = ""
    return found
