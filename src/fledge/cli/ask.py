"""Asking an index: `search` shows passages, `ask` answers from them and says where it stands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.intervals import Interval
from fledge.core.language import t
from fledge.core.store import Store, find_model


def search_index(index: str, query: str, k: int, by: str, embedder: str, diversity: float, as_json: bool) -> None:
    """`fledge find`."""
    passages = retriever_of(index, embedder, by, diversity).search(query, k)
    if as_json:
        print(
            json.dumps(
                [{**vars(passage), "where": passage.where} for passage in passages], ensure_ascii=False, indent=1
            )
        )
        return
    from fledge.cli.console import terminal

    console = terminal()
    for number, passage in enumerate(passages, 1):
        console.print(f"[{number}] {passage.where}", style="bold", markup=False, end="")
        console.print(f"  {passage.score:.3f}  {passage.heading}", style="dim", markup=False)
        console.print(passage.text + "\n", markup=False)
    if not passages:
        console.print(t("nothing was found"), style="yellow")


def ask_index(
    index: str, model: str, question: str, k: int, by: str, embedder: str, diversity: float, abstain: bool,
    max_tokens: int, dtype: str, engine: str, test: str, as_json: bool,
) -> None:  # fmt: skip
    """`fledge ask`."""
    retriever = retriever_of(index, embedder, by, diversity)
    questions = _questions(test) if test else []
    from fledge.cli.use import _engine
    from fledge.inference.retrieval.answering import RetrievalAugmented

    assistant = RetrievalAugmented(
        _engine(model, dtype, engine), retriever, k=k, abstain=abstain, max_new_tokens=max_tokens
    )
    if test:
        _measure(assistant, questions, as_json)
    elif question:
        _answer(assistant, question, as_json)
    else:
        for line in _lines():
            _answer(assistant, line, as_json)


def find_index(name: str, store: Store) -> Path:
    """The index that `name` means: a folder, `RUN/STAGE`, or a run that made one."""
    if (Path(name) / "index.json").is_file():
        return Path(name)
    try:
        return find_model(name, store, prefer=("index",))
    except FledgeError:
        raise FledgeError(
            Problem(t('"{name}" is neither an index nor a run that made one', name=name),
                    fix=t("run: fledge index FOLDER --out INDEX"))
        ) from None  # fmt: skip


def retriever_of(index: str, embedder: str = "", by: str = "auto", diversity: float = 0.0) -> Any:
    """The retriever over the index of that name, with the model of its vectors where one is named."""
    store = Store()
    folder = find_index(index, store)
    from fledge.inference.retrieval.retriever import Retriever

    engine: Any = None
    if embedder:
        from fledge.inference.opening import open_engine

        engine = open_engine(find_model(embedder, store, ("task-model", "model", "adapter")))
    return Retriever.open(folder, engine, by=by, diversity=diversity)


def _questions(test: str) -> list[Any]:
    from fledge.inference.retrieval.measure import read_questions

    return read_questions(Path(test))


def _lines() -> Any:
    """Questions from the terminal or a pipe, one a line."""
    while True:
        if sys.stdin.isatty():
            print("\n> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(assistant: Any, question: str, as_json: bool) -> None:
    if as_json:
        answer = assistant.answer(question)
        row = {
            "question": question, "answer": answer.shown, "abstained": answer.abstained, "problems": answer.problems,
            "citations": [vars(citation) for citation in answer.citations],
            "passages": [{**vars(passage), "where": passage.where} for passage in answer.passages],
        }  # fmt: skip
        print(json.dumps(row, ensure_ascii=False))
        return
    from fledge.cli.console import terminal
    from fledge.serving.terminal import show_sources

    answer = assistant.answer(question, listen=lambda text: print(text, end="", flush=True))
    print()
    show_sources(answer, terminal())


def _measure(assistant: Any, questions: list[Any], as_json: bool) -> None:
    """The questions of a file, without the index and with it, side by side."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from fledge.cli.console import terminal
    from fledge.inference.retrieval.measure import compare

    console = terminal(quiet=as_json)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(t("questions"), total=len(questions))
        found = compare(assistant, questions, lambda done, total: progress.update(task, completed=done))
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("", t("right"), t("made up"), t("left open")):
        table.add_column(title)
    for name, side in ((t("without sources"), found.closed), (t("with sources"), found.with_sources)):
        table.add_row(name, *(_percent(value) for value in (side.right, side.made_up, side.open)))
    console.print(table)
    gain = t("right oftener with sources: {gain}, p = {p}", gain=_percent(found.gain), p=f"{found.p_value:.2g}")
    console.print(gain)
    if found.recall is not None:
        console.print(t("the sources that hold the answer were found: {share}", share=f"{100 * found.recall:.0f}%"))


def _percent(value: Interval) -> str:
    return f"{100 * value.value:.0f}% [{100 * value.low:.0f}, {100 * value.high:.0f}]"
