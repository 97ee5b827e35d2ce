"""Evaluation items taken out of training data."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PrivateAttr

from fledge.core.artifact import Artifact
from fledge.core.reference import Ref
from fledge.core.stage import Config
from fledge.data.chunk import Chunk
from fledge.data.steps.base import CorpusStep, Find, Refused, Rejected, Sketches
from fledge.data.texts import units

if TYPE_CHECKING:
    import pyarrow as pa

    from fledge.data.decontamination.contamination import ItemIndex

MOST_PIECES = 10


class Overlap(Config):
    """What counts as evidence that a document holds an evaluation item."""

    n: int = Field(13, ge=2, description="units in an n-gram: words, or characters where words are not spaced")
    shortest: int = Field(8, ge=2, description="units; a question shorter than n counts whole from so many on")
    common_items: int = Field(5, ge=1, description="an n-gram that more items share is boilerplate")
    common_documents: float = Field(
        0.001,
        gt=0,
        le=1,
        description="an n-gram that a larger share of the documents (and over 10) hold is boilerplate",
    )
    least: float = Field(
        0.0, ge=0, le=1, description="share of an item's units that the evidence must cover; 0: one n-gram is enough"
    )


class Decontaminate(Overlap, CorpusStep, name="decontaminate"):
    """Documents that share n-grams with evaluation items, by the rule of GPT-3 (Brown et al., 2020, appendix C):
    refused, cut (the n-gram goes with `margin` characters on both sides, then short pieces, and a document in more than
    10 pieces; what is no document is refused), or tagged in `meta.contamination`."""

    items: list[Ref[Artifact]] = Field(
        min_length=1, description="the evaluation items: package:NAME, files and folders, or records of a stage"
    )
    action: Literal["reject", "cut", "tag"] = Field("reject", description="what happens to a document with evidence")
    margin: int = Field(200, ge=0, description="cut: characters that go on both sides of an n-gram")
    least_piece: int = Field(200, ge=1, description="cut: characters of the shortest piece that stays")
    _index: ItemIndex | None = PrivateAttr(None)

    def start(self, find: Find) -> None:
        self._index = self.index(find)

    def index(self, find: Find) -> ItemIndex:
        """The items' n-grams."""
        from fledge.data.decontamination.contamination import ItemIndex
        from fledge.data.decontamination.eval_items import read_items

        items = [item for ref in self.items for item in read_items(ref.text, find(ref))]
        return ItemIndex(items, self.n, self.shortest, self.common_items)

    def sketch(self, chunk: Chunk) -> pa.Table:
        from fledge.data.decontamination.contamination import sketch

        assert self._index is not None
        return sketch(self._index, chunk.of_each(units), chunk.ids)

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        import pyarrow as pa

        from fledge.data.decontamination.contamination import Match, matches

        rows: dict[int, list[Match]] = {}
        for match in matches(sketches.tables(), sketches.rows, self.common_documents, self.least):
            rows.setdefault(match.row, []).append(match)
        return pa.table(
            {
                "row": pa.array(list(rows), pa.int64()),
                "items": pa.array(
                    [[f"{m.task}:{m.item}" for m in some] for some in rows.values()], pa.list_(pa.string())
                ),
                "tasks": pa.array([[m.task for m in some] for some in rows.values()], pa.list_(pa.string())),
                "keys": pa.array(
                    [sorted({key for m in some for key in m.keys}) for some in rows.values()], pa.list_(pa.uint64())
                ),
            }
        )

    def apply(self, chunk: Chunk, verdicts: pa.Table, counts: Counter[str]) -> tuple[Chunk, Refused]:
        lines = {line["row"]: line for line in verdicts.to_pylist()}
        for line in lines.values():
            counts.update(f"contamination/{task}" for task in line["tasks"])
        said = {row: _listed(line["items"]) for row, line in lines.items()}
        if self.action == "tag":
            return chunk.with_meta("contamination", [said.get(row, "") for row in range(len(chunk))]), {}
        if self.action == "reject" or chunk.kind != "documents":
            return chunk, {row: Rejected("holds an evaluation item", value) for row, value in said.items()}
        texts = list(chunk.texts)
        refused: Refused = {}
        for row, line in lines.items():
            pieces = self._cut(texts[row], line["keys"])
            if not pieces or len(pieces) > MOST_PIECES:
                refused[row] = Rejected("too little is left without evaluation items", said[row])
            else:
                texts[row] = "\n".join(pieces)
        counts["contamination/cut"] += len(lines) - len(refused)
        return (chunk.with_column("text", texts) if lines else chunk), refused

    def _cut(self, text: str, keys: list[int]) -> list[str]:
        from fledge.data.decontamination.contamination import cut, spans_of

        spans = spans_of(text, keys, range(min(self.shortest, self.n), self.n + 1))
        return cut(text, spans, self.margin, self.least_piece)


def _listed(items: list[str]) -> str:
    return ", ".join(items[:10]) + (f", … ({len(items)})" if len(items) > 10 else "")
