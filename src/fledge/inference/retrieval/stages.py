"""Stage `index`: a folder of texts becomes something that can be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from fledge.core.artifact import Conversations, Documents, Index, Model, TaskModel
from fledge.core.errors import Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.stage import Estimate, Size, Stage


class MakeIndex(Stage, use="index", version=1):
    """An index over texts, to search and to answer from: passages, inverted lists (BM25), and vectors where an
    embedding model is named. Files of every kind that fledge reads: text, Markdown, HTML, PDF, EPUB, JSON lines, …"""

    data: Ref[Documents | Conversations] = Field(description="a folder or file of texts, or documents of a stage")
    embedder: Ref[Model | TaskModel] | None = Field(
        None, description="a model that gives vectors (of train.embed, or any): search by meaning, too"
    )
    size: int = Field(200, ge=8, description="words (or Chinese characters) of a passage, at most")
    overlap: int = Field(40, ge=0, description="how many of them may stand in two passages that follow one another")
    segmenter: Literal["auto", "jieba", "bigrams"] = Field(
        "bigrams",
        description="how Chinese becomes words: pairs of characters, jieba, or auto: jieba where there is one",
    )
    k1: float = Field(1.2, ge=0, description="BM25: how much repetition of a word still adds")
    b: float = Field(0.75, ge=0, le=1, description="BM25: how far long passages are marked down")
    previous: Ref[Index] | None = Field(None, description="an older index: what has not changed is taken over from it")

    def check(self) -> Iterator[Problem]:
        if self.overlap >= self.size:
            yield Problem(
                t("the overlap of passages is smaller than they are"), "overlap", str(self.overlap),
                f"0 … {self.size - 1}",
            )  # fmt: skip

    def run(self, job: Job) -> Index:
        from fledge.inference.retrieval.index import Cut, build_index
        from fledge.inference.retrieval.index import Index as Opened

        engine: Any = None
        if self.embedder is not None:
            from fledge.inference.opening import open_engine

            engine = open_engine(job.open(self.embedder).path, device=job.execution.device)
        metrics = build_index(
            job.open(self.data).path,
            job.out,
            Cut(self.size, self.overlap, self.segmenter),
            engine,
            embedder=self.embedder.text if self.embedder else "",
            k1=self.k1,
            b=self.b,
            previous=Opened.open(job.open(self.previous).path) if self.previous else None,
            tell=job.events.progress,
        )
        if engine is not None:
            engine.close()
        return Index(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        size = sizes.get(self.data.text) or Size(bytes=1e7)
        bytes_ = size.bytes or 1e7
        seconds = 1 + bytes_ / 1e6
        if self.embedder is not None:
            parameters = (sizes.get(self.embedder.text) or Size()).parameters or 50e6
            seconds += bytes_ / 3 * 2 * parameters / machine.rate("evaluate.flops", 25e9)
        return Estimate((0.3 * seconds, 3 * seconds), (0.3e9, 0.5e9 + 20 * bytes_), 2 * bytes_)
