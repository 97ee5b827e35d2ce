"""Answers from what an index holds, and examples chosen for the question: what needs more than the model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fledge.core.reference import Source
from fledge.inference.engine import PromptTooLong
from fledge.inference.prompting.base import Technique
from fledge.inference.prompting.framing import Example, FewShot, inner
from fledge.inference.prompting.program import Program
from fledge.inference.prompting.talk import Question, Solution, Talk
from fledge.inference.prompting.tools import tool_of

if TYPE_CHECKING:
    from fledge.inference.prompting.techniques import AnyTechnique


class Retrieval(Technique):
    """Answers from passages that are found by the question, and cites them (Lewis et al., 2020).

    Where nothing is found, or the passages do not hold the answer, the model may say so (`abstain`). Passages are left
    out from the last one on while the model's context is too small for them. What is wrong with the citations stands in
    the trace, in a step "check".
    """

    guarded: ClassVar[tuple[str, ...]] = ("index", "embedder")

    use: Literal["retrieval"] = Field("retrieval", description="answers from an index, with citations")
    index: Source | None = Field(
        None, description="the folder of an index; without one, that in which the run's tool `search` looks"
    )
    embedder: Source | None = Field(
        None, description="the folder of the model of the index's vectors; without one, by words alone"
    )
    k: int = Field(4, ge=1, le=100, description="passages at most")
    diversity: float = Field(0.0, ge=0, le=1, description="MMR: how far passages that are alike are avoided")
    abstain: bool = Field(True, description="the model may answer that the sources do not hold it")
    over: AnyTechnique | None = Field(None, description="the technique that answers; without one, the model directly")

    def needs(self) -> frozenset[str]:
        return super().needs() | (frozenset() if self.index else {"search"})

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        from fledge.inference.retrieval.answering import Answer, GroundedPrompt
        from fledge.inference.retrieval.citations import without_marks
        from fledge.inference.retrieval.wording import wording_for

        if self.index:
            searcher = retriever(self.index.text, self.embedder.text if self.embedder else "", self.diversity)
        else:
            searcher = tool_of("search", talk.tools).retriever  # type: ignore[attr-defined]
        passages = list(searcher.search(question.text, self.k))
        talk.decide("search", tool="search", observation="\n".join(passage.where for passage in passages))
        if not passages and self.abstain:
            nothing = wording_for(question.text).nothing
            return Solution(nothing, nothing)
        while True:
            prompt = GroundedPrompt.of(question.text, passages, self.abstain)
            asked = question.asking(f"{prompt.instruction}\n\n{prompt.body}")
            try:
                solution = yield from inner(self.over).program(asked, talk)
                break
            except PromptTooLong:
                if not passages:
                    raise
                passages = passages[:-1]
        answer = Answer(question.text, solution.text, tuple(passages))
        if answer.problems:
            talk.decide("check", answer="\n".join(answer.problems))
        return Solution(without_marks(solution.answer), answer.shown)


class SelectedShots(Technique):
    """Examples before the question, chosen for it from a pool: near ones, near ones that are not alike, good ones
    (Liu et al., 2022), in an order of your own. See `inference.examples.selection`."""

    guarded: ClassVar[tuple[str, ...]] = ("pool", "embedder")
    verbatim: ClassVar[bool] = True

    use: Literal["selected_shots"] = Field("selected_shots", description="examples before the question, chosen for it")
    pool: Source = Field(description="a file or folder of records with answers: prompts, conversations, …")
    k: int = Field(4, ge=1, le=1000, description="examples")
    by: Literal["random", "similar", "embedding", "diverse", "quality"] = Field(
        "similar", description="how they are chosen"
    )
    order: Literal["as_is", "similar_last", "similar_first", "random"] = Field(
        "similar_last", description="the order in which they stand"
    )
    embedder: Source | None = Field(
        None, description="the folder of a model that gives vectors: for embedding and diverse"
    )
    diversity: float = Field(0.3, ge=0, le=1, description="diverse: how far examples that are alike are avoided")
    seed: int = Field(0, description="another one, other random draws")
    layout: Literal["turns", "text"] = Field("turns", description="as turns of user and assistant, or as one text")
    task: str = Field("", description="what is to be done, in a sentence")
    over: AnyTechnique | None = Field(None, description="the technique that answers; without one, the model directly")

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        chosen = selector(self).select(question.about or question.text, self.k)
        talk.decide("select", observation="\n".join(example.question for example in chosen))
        if not chosen:
            return (yield from inner(self.over).program(question, talk))
        shots = FewShot(
            examples=[Example(question=example.question, answer=example.answer) for example in chosen],
            layout=self.layout, task=self.task, over=self.over,
        )  # fmt: skip
        return (yield from shots.program(question, talk))


def retriever(index: str, embedder: str = "", diversity: float = 0.0) -> Any:
    """The retriever over an index, opened once in a process, and again when the index was made anew."""
    return _opened(index, _changed(Path(index) / "index.json"), embedder, diversity)


def selector(settings: SelectedShots) -> Any:
    """The selector over a pool, read once in a process, and again when its file changed."""
    kept = settings.model_copy(update={"k": 1, "layout": "turns", "task": "", "over": None})
    return _pool(kept.model_dump_json(), _changed(Path(settings.pool.text)))


@lru_cache(maxsize=8)
def _opened(index: str, changed: int, embedder: str, diversity: float) -> Any:
    from fledge.inference.retrieval.retriever import Retriever

    return Retriever.open(index, _engine(embedder), diversity=diversity)


@lru_cache(maxsize=8)
def _pool(settings: str, changed: int) -> Any:
    from fledge.inference.examples.example import examples_of
    from fledge.inference.examples.selection import Selector
    from fledge.records.shards import kind_in, read

    given = SelectedShots.model_validate_json(settings)
    path = Path(given.pool.text)
    examples = examples_of(read(path, kind_in(path)))
    return Selector(
        examples,
        given.by,
        given.order,
        engine=_engine(given.embedder.text if given.embedder else ""),
        seed=given.seed,
        diversity=given.diversity,
    )


@lru_cache(maxsize=2)
def _engine(folder: str) -> Any:
    if not folder:
        return None
    from fledge.inference.opening import open_engine

    return open_engine(folder)


def _changed(file: Path) -> int:
    """When a file was last written, in ns; 0 where it is not there: whoever opens it says so."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
