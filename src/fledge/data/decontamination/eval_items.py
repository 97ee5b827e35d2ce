"""Evaluation items as their makers publish them: a question, what may be answered, a task's name, an item's id.

One reader for all: MMLU's tables without a header, GSM8K, HellaSwag, TruthfulQA, ARC, HumanEval, MT-Bench and
Self-Instruct differ in the names of their keys. Ids are those that the task `choice` gives the same rows, so that what
is found here can be laid beside an evaluation. Records of ours are items, too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.records.kinds import Preference, Prompt, Rating, texts
from fledge.records.raw.files import rows_of
from fledge.records.shards import kind_in, read, shards_of

QUESTION = (
    "question",
    "query",
    "problem",
    "ctx",
    "ctx_a",
    "context",
    "prompt",
    "instruction",
    "turns",
    "goal",
    "passage",
)
ANSWERS = (
    "choices", "options", "endings", "mc1_targets", "mc2_targets", "answer", "answers", "solution",
    "canonical_solution", "upstream_answer", "output", "response", "instances", "best_answer",
    "correct_answers", "A", "B", "C", "D",
)  # fmt: skip
IDS = ("id", "ind", "task_id", "question_id", "qid")
READABLE = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_PACKED = (".gz", ".zst")
_GENERIC = ("cases", "data", "dev", "items", "question", "questions", "test", "train", "val", "validation")
_SPLITS = ("_cases", "_dev", "_test", "_train", "_val", "_validation")


@dataclass(frozen=True)
class EvalItem:
    """One item: what is asked, and the texts that may answer it."""

    task: str
    id: str
    question: tuple[str, ...]
    answers: tuple[str, ...] = ()


def read_items(named: str, paths: Sequence[Path]) -> list[EvalItem]:
    """The items at some paths (a fledge folder, files, folders of files). Raises FledgeError where there is none."""
    items: list[EvalItem] = []
    for path in paths:
        if shards_of(path):
            items += _records(named, path)
        else:
            for file in _files(path):
                items += _file(file)
    if not items:
        raise FledgeError(
            Problem(
                t("{source} holds no evaluation items", source=named),
                allowed=t("rows with a question, prompt or context; tables of MMLU; records"),
            )
        )
    return items


def _files(path: Path) -> Iterator[Path]:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.name
        for ending in _PACKED:
            name = name.removesuffix(ending)
        if name.endswith(READABLE) and file.is_file() and not any(p.endswith(".dist-info") for p in file.parts):
            yield file


def _records(named: str, path: Path) -> Iterator[EvalItem]:
    for record in read(path, kind_in(path)):
        if isinstance(record, Prompt):
            yield EvalItem(named, record.id, tuple(texts(record)), (record.answer,) if record.answer else ())
        elif isinstance(record, (Preference, Rating)):
            asked = tuple(message.content for message in record.prompt)
            yield EvalItem(named, record.id, asked, tuple(texts(record))[len(asked) :])
        else:
            yield EvalItem(named, record.id, tuple(texts(record)))


def _file(file: Path) -> Iterator[EvalItem]:
    task = task_of(file)
    if file.suffix.lower() == ".csv" and (table := _headerless(file)) is not None:
        for number, row in enumerate(table, start=1):
            yield EvalItem(task, f"{file.name}:{number}", (row[0],), tuple(row[1:-1]))
        return
    for row in rows_of(file):
        for number, value in enumerate(_rows_in(row.value)):
            where = row.where if value is row.value else f"{row.where}[{number}]"
            item = item_of(task, value, where)
            if item is not None:
                yield item


def task_of(file: Path) -> str:
    """`gsm8k/cases.jsonl` → gsm8k, `anatomy_dev.csv` → anatomy."""
    stem = file.name.partition(".")[0]
    for split in _SPLITS:
        stem = stem.removesuffix(split)
    return file.parent.name if stem in _GENERIC and file.parent.name else stem


def _headerless(file: Path) -> list[list[str]] | None:
    """MMLU's tables: a question, the choices, the letter of the right one, in every row from the first."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        rows = [row for row in csv.reader(stream) if row]
    fits = bool(rows) and all(len(row) == len(rows[0]) > 3 and row[-1].strip() in "ABCDEFGHIJ" for row in rows)
    return rows if fits else None


def _rows_in(value: Any) -> Iterable[Any]:
    """The value, or the rows under a key of it that holds a list of objects with questions."""
    if isinstance(value, Mapping) and not any(key in value for key in QUESTION):
        for inner in value.values():
            if isinstance(inner, list) and inner and isinstance(inner[0], Mapping) and _asks(inner[0]):
                return inner
    return [value]


def _asks(row: Mapping[str, Any]) -> bool:
    return any(any(_texts(row.get(key))) for key in QUESTION)


def item_of(task: str, row: Any, where: str) -> EvalItem | None:
    """A row as an item; None where it asks nothing."""
    if not isinstance(row, Mapping) or not _asks(row):
        return None
    question = tuple(text for key in QUESTION for text in _texts(row.get(key)))
    answers = tuple(text for key in ANSWERS for text in _texts(row.get(key)))
    own = next((str(row[key]) for key in IDS if row.get(key) not in (None, "")), where)
    return EvalItem(task, own, question, answers)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, however deep; numbers and labels are no texts."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("label", "labels", "role", "id"):
                yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
