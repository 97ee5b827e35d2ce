"""Passages that stand in several texts, or twice in one: the first stays, the others are cut from the text around them.

Which is first: that of an earlier corpus, of the longest text, of the text with the smallest hash of its id; in one
text the place. What is cut is counted; a text of which nothing is left is refused.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pydantic import Field

from fledge.data.chunk import Chunk
from fledge.data.steps.base import CorpusStep, Refused, Sketches

if TYPE_CHECKING:
    import pyarrow as pa

    from fledge.data.dedup.cutting import Span


class _Passages(CorpusStep):
    """What the two have in common: passages are cut, rows refused only where nothing is left."""

    def apply(self, chunk: Chunk, verdicts: pa.Table, counts: Counter[str]) -> tuple[Chunk, Refused]:
        from fledge.data.dedup.cutting import without

        lines = verdicts.to_pydict()
        runs: dict[int, list[tuple[int, ...]]] = {}
        for row, *run in zip(lines.pop("row"), *lines.values(), strict=True):
            runs.setdefault(row, []).append(tuple(run))
        cuts = {row: spans for row, of in runs.items() if (spans := self._spans(chunk.texts[row], of))}
        counts[f"{self.name}/texts"] += len(cuts)
        counts[f"{self.name}/passages"] += sum(map(len, cuts.values()))
        counts[f"{self.name}/characters"] += sum(end - start for spans in cuts.values() for start, end in spans)
        return without(chunk, cuts)

    def kept(self, sketch: pa.Table, verdicts: pa.Table) -> pa.Table:
        return sketch

    def _spans(self, text: str, runs: list[tuple[int, ...]]) -> list[Span]:
        """The characters to cut for the verdicts on a text."""
        raise TypeError(f"{type(self).__name__} cuts nothing")


class SubstringDedup(_Passages, name="substring"):
    """Spans of 50 words, or of 100 characters where words are not spaced, that occur again are cut (after Lee et al.,
    2022, Deduplicating training data makes language models better). Cuts are made where units begin. Its sketch takes
    12 bytes of disk a unit, and twice as much while it decides."""

    words: int = Field(50, ge=2, description="words that two texts must share in a row")
    characters: int = Field(100, ge=2, description="the same, in characters of scripts that do not space words")

    def sketch(self, chunk: Chunk) -> pa.Table:
        import pyarrow as pa

        from fledge.data.dedup.corpora import rank_columns
        from fledge.data.dedup.spans import Windows

        windows = Windows.of(chunk.texts, self.words, self.characters)
        none = pa.array([[]] * len(chunk), pa.list_(pa.uint32()))
        return pa.table({
            **rank_columns(chunk),
            "key": pa.ListArray.from_arrays(pa.array(windows.bounds, pa.int32()), pa.array(windows.keys)),
            "check": pa.ListArray.from_arrays(pa.array(windows.bounds, pa.int32()), pa.array(windows.checks)),
            "at": none,
        })  # fmt: skip

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        import pyarrow as pa

        from fledge.data.dedup.corpora import Corpora
        from fledge.data.dedup.spans import runs

        return pa.table(dict(zip(("row", "first", "last", "kept"), runs(Corpora(sketches, earlier)), strict=True)))

    def _spans(self, text: str, runs: list[tuple[int, ...]]) -> list[Span]:
        import numpy as np

        from fledge.data.dedup.spans import Windows, cut_units
        from fledge.data.dedup.units import positions

        ends = Windows.of([text], self.words, self.characters).ends
        first, last, kept = np.array(runs, dtype=np.int64).T
        begins = [*(start for start, _ in positions(text)), len(text)]
        return [(begins[start], begins[end]) for start, end in cut_units(ends, first, last, kept)]


class LineDedup(_Passages, name="lines"):
    """Lines that occur again are cut, as CCNet does with paragraphs (Wenzek et al., 2020): two are one when they differ
    in nothing but case, white space, punctuation and width. Short ones stay, as in verse and lists."""

    minimum: int = Field(10, ge=1, description="words or unspaced characters that a line must have to be compared")

    def sketch(self, chunk: Chunk) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from fledge.data.dedup.corpora import rank_columns
        from fledge.data.dedup.exact import keys

        lines = [text.split("\n") for text in chunk.texts]
        flat = [(row, at, line) for row, of in enumerate(lines) for at, line in enumerate(of) if line.strip()]
        first, second, sizes = keys([line for *_, line in flat])
        long = np.flatnonzero(sizes >= self.minimum)
        row = np.fromiter((row for row, *_ in flat), dtype=np.int64, count=len(flat))[long]
        at = np.fromiter((at for _, at, _ in flat), dtype=np.uint32, count=len(flat))[long]
        bounds = pa.array(np.searchsorted(row, np.arange(len(chunk) + 1)), pa.int32())
        return pa.table({
            **rank_columns(chunk),
            "key": pa.ListArray.from_arrays(bounds, pa.array(first[long])),
            "check": pa.ListArray.from_arrays(bounds, pa.array((second[long] >> np.uint64(32)).astype(np.uint32))),
            "at": pa.ListArray.from_arrays(bounds, pa.array(at)),
        })  # fmt: skip

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from fledge.data.dedup.corpora import Corpora
        from fledge.data.dedup.spans import repeated

        corpora = Corpora(sketches, earlier)
        found = [np.stack([row - corpora.first, at]) for row, at, _ in repeated(corpora)]
        row, at = np.concatenate([np.zeros((2, 0), dtype=np.int64), *found], axis=1)
        order = np.lexsort((at, row))
        return pa.table({"row": row[order], "at": at[order]})

    def _spans(self, text: str, runs: list[tuple[int, ...]]) -> list[Span]:
        begins = [0]
        for line in text.split("\n"):
            begins.append(begins[-1] + len(line) + 1)
        return [(begins[at], min(begins[at + 1], len(text))) for (at,) in runs]
