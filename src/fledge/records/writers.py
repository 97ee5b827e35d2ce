"""Records into raw files: the way back of `records.formats`, in every spelling and as JSON lines, JSON, CSV, Parquet
or Arrow.

    write_format(records, "sharegpt", Path("chat.jsonl"))

What is written is read back as it was, whatever the file: cells of CSV hold lists and objects as JSON.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fledge.core.artifact import sha256_of, write_atomic
from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.records.kinds import Conversation, Document, Labelled, Message, Preference, Prompt, Rating, Record
from fledge.records.values import Values, as_text

if TYPE_CHECKING:
    import pyarrow as pa

_COMMON = ("id", "language", "source", "meta")
_GROUP_ROWS = 1_000


def write_format(records: Iterable[Record], format: str, file: Path) -> int:
    """Write records in the spelling `format` (one of WRITERS) as the file's ending says; returns how many.

    `formats.load` gives them back as they were. Raises FledgeError for a record that the format cannot hold; the file
    is there whole or not at all.
    """
    known(format)
    write = FILES.get(file.suffix)
    if write is None:
        raise FledgeError(Problem(t("is not a file that can be written"), where=str(file), allowed=listing([*FILES])))
    draft = file.with_name(f".{file.name}.draft")
    try:
        written = write(_rows(records, format), format, draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    return written


def save_to_disk(records: Iterable[Record], format: str, folder: Path) -> int:
    """Write records as a folder that `datasets.load_from_disk` opens: one Arrow file and two notes beside it."""
    name = "data-00000-of-00001.arrow"
    written = write_format(records, format, folder / name)
    info = {"citation": "", "description": "", "homepage": "", "license": ""}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name}], "_fingerprint": sha256_of(folder / name)[:16], "_format_columns": None,
        "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    for file, said in (("dataset_info.json", info), ("state.json", state)):
        write_atomic(folder / file, json.dumps(said, indent=2) + "\n")
    return written


def known(format: str) -> None:
    """Raises FledgeError where no format has that name."""
    if format not in WRITERS:
        what = t('no format is called "{name}"', name=format)
        raise FledgeError(Problem(what, allowed=listing([*WRITERS]), fix=did_you_mean(format, WRITERS)))


def spelled(record: Record, format: str) -> Values | None:
    """The record as a row of that format, with its id, language, source and meta; None where the format cannot say
    all of it."""
    row = WRITERS[format](record)
    if row is None:
        return None
    common: Values = {"id": record.id, "language": record.language, "source": record.source, "meta": dict(record.meta)}
    return row | {key: value for key, value in common.items() if value}


def _rows(records: Iterable[Record], format: str) -> Iterator[Values]:
    for record in records:
        row = spelled(record, format)
        if row is None:
            raise FledgeError(t('the record {id} cannot be written as "{name}"', id=record.id, name=format))
        yield row


# --- spellings ------------------------------------------------------------------------------------------------------


def _to_messages(record: Record) -> Values | None:
    return {"messages": [m.to_dict() for m in record.messages]} if isinstance(record, Conversation) else None


def _to_sharegpt(record: Record) -> Values | None:
    if not isinstance(record, Conversation):
        return None
    names = {"user": "human", "assistant": "gpt"}
    turns = []
    for turn in map(Message.to_dict, record.messages):
        role, content = turn.pop("role"), turn.pop("content")
        turns.append({"from": names.get(role, role), "value": content, **turn})
    return {"conversations": turns}


def _to_alpaca(record: Record) -> Values | None:
    """An optional system prompt, then users and assistants in turn, which is all that Alpaca can say."""
    if not isinstance(record, Conversation) or any(m != Message(m.role, m.content) for m in record.messages):
        return None
    system = [m.content for m in record.messages[:1] if m.role == "system"]
    turns = record.messages[len(system) :]
    if not turns or [m.role for m in turns] != ["user", "assistant"] * (len(turns) // 2):
        return None
    rounds = [[question.content, answer.content] for question, answer in zip(turns[::2], turns[1::2], strict=True)]
    question, answer = rounds.pop()
    row: Values = {"instruction": question, "input": "", "output": answer}
    return row | ({"system": system[0]} if system else {}) | ({"history": rounds} if rounds else {})


def _to_preference(record: Record) -> Values | None:
    if not isinstance(record, Preference) or [(a.rank, a.by) for a in record.answers] != [(1, ""), (2, "")]:
        return None
    chosen, rejected = ([{"role": "assistant", "content": answer.content}] for answer in record.answers)
    return {"prompt": [m.to_dict() for m in record.prompt], "chosen": chosen, "rejected": rejected}


def _to_ranking(record: Record) -> Values | None:
    """Ranks without a gap, as they are read."""
    if not isinstance(record, Preference):
        return None
    ranks = [answer.rank for answer in record.answers]
    if sorted(set(ranks)) != [*range(1, len(set(ranks)) + 1)]:
        return None
    answers = [{"content": a.content, **({"by": a.by} if a.by else {})} for a in record.answers]
    return {"prompt": [m.to_dict() for m in record.prompt], "answers": answers, "ranks": ranks}


def _to_rating(record: Record) -> Values | None:
    if not isinstance(record, Rating):
        return None
    return {"prompt": [m.to_dict() for m in record.prompt], "answer": record.answer, "score": record.score}


def _to_classification(record: Record) -> Values | None:
    return {"text": record.text, "label": record.label} if isinstance(record, Labelled) else None


def _to_text(record: Record) -> Values | None:
    return {"text": record.text} if isinstance(record, Document) else None


def _to_prompt(record: Record) -> Values | None:
    if not isinstance(record, Prompt):
        return None
    if len(record.messages) > 1 and record.messages[-1].role == "assistant":
        return None  # it would be read as the answer
    return {
        "prompt": [m.to_dict() for m in record.messages],
        **({"ground_truth": record.answer} if record.answer else {}),
    }


WRITERS: dict[str, Callable[[Record], Values | None]] = {
    "alpaca": _to_alpaca,
    "sharegpt": _to_sharegpt,
    "messages": _to_messages,
    "preference": _to_preference,
    "ranking": _to_ranking,
    "rating": _to_rating,
    "classification": _to_classification,
    "text": _to_text,
    "prompt": _to_prompt,
}
"""Name of a format → how it spells a record, or None for one that it cannot hold."""

KIND_OF_FORMAT = {
    "alpaca": "conversations",
    "sharegpt": "conversations",
    "messages": "conversations",
    "preference": "preferences",
    "ranking": "preferences",
    "rating": "ratings",
    "classification": "labelled",
    "text": "documents",
    "prompt": "prompts",
}
"""Name of a format → the kind of record that it holds."""

_COLUMNS = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "ranking": ("prompt", "answers", "ranks"),
    "rating": ("prompt", "answer", "score"),
    "classification": ("text", "label"),
    "text": ("text",),
    "prompt": ("prompt", "ground_truth"),
}


# --- files ----------------------------------------------------------------------------------------------------------


def _json_lines(rows: Iterator[Values], format: str, file: Path) -> int:
    with file.open("w", encoding="utf-8", newline="\n") as out:
        return _counted(rows, lambda row, number: out.write(json.dumps(row, ensure_ascii=False) + "\n"))


def _json(rows: Iterator[Values], format: str, file: Path) -> int:
    with file.open("w", encoding="utf-8", newline="\n") as out:
        written = _counted(rows, lambda row, number: _element(out, row, number))
        out.write("\n]\n" if written else "[]\n")
    return written


def _element(out: TextIO, row: Values, number: int) -> None:
    out.write((",\n" if number else "[\n") + json.dumps(row, ensure_ascii=False))


def _csv(rows: Iterator[Values], format: str, file: Path) -> int:
    columns = (*_COLUMNS[format], *_COMMON)
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
        table.writerow(columns)
        return _counted(rows, lambda row, number: table.writerow([as_text(row.get(name, "")) for name in columns]))


def _parquet(rows: Iterator[Values], format: str, file: Path) -> int:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, _schema(format), compression="zstd") as table:
        return _tables(rows, format, table.write_table)


def _arrow(rows: Iterator[Values], format: str, file: Path) -> int:
    """The streaming format, which `datasets` maps into memory."""
    import pyarrow as pa

    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, _schema(format)) as table:
        return _tables(rows, format, table.write_table)


def _tables(rows: Iterator[Values], format: str, write: Callable[[pa.Table], Any]) -> int:
    """Rows of strings, numbers, structs and lists: `datasets` and polars read them as they are."""
    import pyarrow as pa

    columns, group = _schema(format), list[Values]()

    def flush() -> None:
        write(pa.Table.from_pylist(group, schema=columns))
        group.clear()

    def add(row: Values, number: int) -> None:
        group.append({name: _plain(name, value) for name, value in row.items()})
        if len(group) == _GROUP_ROWS:
            flush()

    written = _counted(rows, add)
    if group or not written:
        flush()
    return written


def _plain(name: str, value: Any) -> Any:
    """A value of a column as its type wants it: `meta` a list of keys and values, calls of tools as JSON."""
    if name == "meta":
        return [{"key": key, "value": value[key]} for key in sorted(value)]
    if isinstance(value, list) and value and isinstance(value[0], dict) and name != "answers":
        return [{key: as_text(inner) for key, inner in turn.items()} for turn in value]
    return value


def _schema(format: str) -> pa.Schema:
    import pyarrow as pa

    def struct(*names: str) -> pa.DataType:
        return pa.list_(pa.struct([(name, pa.string()) for name in names]))

    aside = ("name", "tool_call_id", "tool_calls")
    turns = struct("role", "content", *aside)
    types: dict[str, pa.DataType] = {
        **dict.fromkeys(("messages", "prompt", "chosen", "rejected"), turns),
        "conversations": struct("from", "value", *aside), "history": pa.list_(pa.list_(pa.string())),
        "answers": struct("content", "by"), "ranks": pa.list_(pa.int64()), "score": pa.float64(),
        "meta": struct("key", "value"),
    }  # fmt: skip
    return pa.schema([(name, types.get(name, pa.string())) for name in (*_COLUMNS[format], *_COMMON)])


def _counted(rows: Iterator[Values], write: Callable[[Values, int], Any]) -> int:
    number = 0
    for number, row in enumerate(rows, 1):
        write(row, number - 1)
    return number


FILES: dict[str, Callable[[Iterator[Values], str, Path], int]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""File ending → how rows are written to it."""
