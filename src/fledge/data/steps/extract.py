"""Extraction: the main text in place of a page of HTML."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field

from fledge.core.errors import need
from fledge.data.chunk import Chunk
from fledge.data.steps.base import Find, Refused, Rejected, Step


class Extract(Step, name="extract"):
    """The main text of documents whose `meta` says `format: html`, their title in `meta` (Kohlschütter et al., 2010;
    Pomikálek, 2011; see `data.extract`); `engine: trafilatura` asks that library (Barbaresi, 2021), slower by far.
    Other rows pass as they are; a page without main text is refused."""

    engine: Literal["fast", "trafilatura"] = Field("fast", description="our own extractor, or trafilatura")

    def start(self, find: Find) -> None:
        need("selectolax.lexbor", "data")
        if self.engine == "trafilatura":
            need("trafilatura", "data")

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> tuple[Chunk, Refused]:
        from fledge.data.extract import extract, extract_with_trafilatura

        engine = extract if self.engine == "fast" else extract_with_trafilatura
        if chunk.kind != "documents":
            return chunk, {}
        texts, metas = list(chunk.texts), [dict(_pairs(meta)) for meta in chunk.rows["meta"].to_pylist()]
        refused: Refused = {}
        for row, meta in enumerate(metas):
            if meta.get("format") != "html":
                continue
            text, title = engine(texts[row])
            counts["extract/pages"] += 1
            if not text:
                refused[row] = Rejected("no main text", title[:40])  # kept as it came
                continue
            texts[row] = text
            meta |= {"format": "text", **({"title": title} if title else {})}
        if texts == chunk.texts:
            return chunk, refused
        written = [[{"key": key, "value": meta[key]} for key in sorted(meta)] for meta in metas]
        return chunk.with_column("text", texts).with_column("meta", written), refused


def _pairs(meta: list[dict[str, str]] | None) -> list[tuple[str, str]]:
    return [(entry["key"], entry["value"]) for entry in meta or []]
