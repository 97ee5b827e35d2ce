"""Taking passages out of the texts of a chunk, also where a row has several (the turns of a conversation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fledge.data.chunk import Chunk
from fledge.data.steps.base import Refused, Rejected
from fledge.data.texts import UNIT, map_texts
from fledge.records.kinds import Record, texts

Span = tuple[int, int]


def without(chunk: Chunk, cuts: Mapping[int, Sequence[Span]]) -> tuple[Chunk, Refused]:
    """The chunk without the given spans of `chunk.texts[row]` (sorted, apart). Rows of which a text that said something
    says nothing any more are refused and left as they were."""
    if not cuts:
        return chunk, {}
    refused: Refused = {}
    records = list(chunk.records)
    for row, spans in cuts.items():
        shorter = _shorter(records[row], spans)
        if any(before.strip() and not after.strip() for before, after in
               zip(texts(records[row]), texts(shorter), strict=True)):  # fmt: skip
            cut = sum(end - start for start, end in spans)
            refused[row] = Rejected("nothing is left of a text", f"{cut} of {len(chunk.texts[row])} characters cut")
        else:
            records[row] = shorter
    return type(chunk).of(chunk.kind, records), refused


def _shorter(record: Record, spans: Sequence[Span]) -> Record:
    """`spans` count through the record's texts as `texts.text_of` joins them."""
    begin = 0

    def change(text: str) -> str:
        nonlocal begin
        parts, at = [], 0
        for start, end in spans:
            low, high = (min(max(edge - begin, 0), len(text)) for edge in (start, end))
            parts.append(text[at : max(at, low)])
            at = max(at, high)
        begin += len(text) + 1
        return _joined([*parts, text[at:]]) if at else text

    return map_texts(record, change)


def _joined(parts: Sequence[str]) -> str:
    """What is left, one behind the other, words kept apart."""
    whole = ""
    for part in parts:
        whole += " " * bool(UNIT.fullmatch(whole[-1:] + part[:1]) and whole and part) + part
    return whole
