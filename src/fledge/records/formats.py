"""Raw files into records, and back: the spellings in which conversations, preferences, labels and texts come.

    for record in load(Path("data.jsonl"), "conversations", rejects): ...

| format | kind | keys |
|---|---|---|
| preference | preferences | prompt, chosen, rejected: texts or messages; without a prompt, what both begin with |
| ranking | preferences | prompt, answers, and ranks (1 is the best) or scores (higher is better) |
| rating | ratings | prompt, answer, score |
| messages | conversations | messages, conversation(s): OpenAI's role/content or ShareGPT's from/value; system |
| alpaca | conversations | instruction, output; input, history, system |
| pair | conversations | prompt and response, question and answer, query and response, …; history, system |
| classification | labelled | text, label |
| text | documents | text |
| prompt | prompts | prompt (text or messages); answer |

The format of a file is found from its first rows; every key has its usual other names. `id`, `language`, `source` are
read where they are there; `meta` and all further keys become the record's meta. A row that does not fit goes to the
rejects with its line and the key that is wrong.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.records import spellings
from fledge.records.files import NOT_UTF8, RawRow, files_in, rows_of
from fledge.records.kinds import Conversation, Message, Preference, Record, as_document, texts
from fledge.records.rejects import Reason, near
from fledge.records.spellings import Common, Misfit, Values, as_text, kind_name

if TYPE_CHECKING:
    from fledge.records.rejects import Rejects

log = logging.getLogger(__name__)
STEP = "read"
"""The step's name among the rejected rows."""
_SAMPLE = 100  # rows that decide a file's format
_PROBLEMS = 5  # problems shown where no row can be used
_COMMON_KEYS = ("id", "language", "lang", "source", "meta")


@dataclass(frozen=True)
class Format:
    """One spelling of one kind of record: name → the keys it may stand under, and how the values make a record."""

    name: str
    kind: str
    build: Callable[[Values, Common], Record]
    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def fits(self, row: Any) -> bool:
        """Whether every required key is there."""
        return isinstance(row, dict) and all(any(key in row for key in keys) for keys in self.required.values())

    def record(self, row: Any) -> Record:
        """The record of a row. Raises Misfit."""
        if isinstance(row, str) and self.name == "text":
            row = {"text": row}
        if not isinstance(row, dict):
            found = kind_name(row)
            raise Misfit("is {found} where an object with {keys} is wanted", found=found, keys=self.needs)
        known = {**self.required, **self.optional}
        under = {name: key for name, keys in known.items() for key in reversed(keys) if row.get(key) is not None}
        extra = {key: value for key, value in row.items() if key not in (*under.values(), *_COMMON_KEYS)}
        self._check_names(row, under, list(extra))
        return self.build({name: row[key] for name, key in under.items()}, _common(row, extra))

    @property
    def needs(self) -> str:
        """The required keys, for messages."""
        return ", ".join(f'"{keys[0]}"' for keys in self.required.values())

    def _check_names(self, row: dict[str, Any], under: Mapping[str, str], extra: list[str]) -> None:
        """Refuse a row without a required key, and one whose unknown key is nearly the name of a missing one."""
        for name, names in {**self.required, **self.optional}.items():
            for key in [] if name in under else extra:
                # The absence of an optional key is no sign of a slip: only a very near word is taken for one.
                hint = near(key, names, cutoff=0.6 if name in self.required else 0.85)
                if hint and key not in names:
                    raise Misfit('"{key}" is unknown; {hint}', key=key, hint=hint)
        for name, names in self.required.items():
            if name not in under:
                empty = next((key for key in names if key in row), None)
                raise Misfit('"{key}" is empty' if empty else '"{key}" is missing', key=empty or names[0])


def _common(row: dict[str, Any], extra: dict[str, Any]) -> Common:
    """`id`, `language` and `source`; the row's `meta` and every key no format knows, as texts."""
    meta = row.get("meta") or {}
    if isinstance(meta, list) and all(isinstance(item, dict) and item.keys() == {"key", "value"} for item in meta):
        meta = {item["key"]: item["value"] for item in meta}  # as our own shards have it
    if not isinstance(meta, dict):
        meta = {"meta": meta}
    meta |= {key: value for key, value in extra.items() if value not in (None, "")}
    given = {"id": row.get("id"), "language": row.get("language", row.get("lang")), "source": row.get("source")}
    common: Common = {key: "" if value is None else as_text(value) for key, value in given.items()}
    return common | {"meta": {str(key): as_text(value) for key, value in meta.items() if value is not None}}


_PROMPT = ("prompt", "question", "instruction", "query", "messages", "conversations", "conversation")
_ANSWER = ("answer", "response", "completion", "output", "reply")
_OPENING = {"system": ("system", "system_prompt"), "history": ("history",)}

FORMATS: tuple[Format, ...] = (
    Format(
        "preference", "preferences", spellings.preference,
        {"chosen": ("chosen",), "rejected": ("rejected",)},
        {"prompt": _PROMPT, "input": ("input",), **_OPENING},
    ),
    Format(
        "ranking", "preferences", spellings.ranking,
        {"prompt": _PROMPT, "answers": ("answers", "responses", "completions", "candidates")},
        {"ranks": ("ranks", "rank", "ranking"), "scores": ("scores", "score", "ratings"), **_OPENING},
    ),
    Format(
        "rating", "ratings", spellings.rating,
        {"prompt": _PROMPT, "answer": _ANSWER, "score": ("score", "rating")}, _OPENING,
    ),
    Format(
        "messages", "conversations", spellings.conversation,
        {"messages": ("messages", "conversations", "conversation")}, _OPENING,
    ),
    Format(
        "alpaca", "conversations", spellings.alpaca,
        {"instruction": ("instruction",), "output": ("output", "response", "answer")},
        {"input": ("input", "context"), **_OPENING},
    ),
    Format(
        "pair", "conversations", spellings.pair,
        {"prompt": ("prompt", "question", "query", "input"), "response": ("response", *_ANSWER)}, _OPENING,
    ),
    Format(
        "classification", "labelled", spellings.labelled,
        {"text": ("text", "sentence", "content"), "label": ("label", "category", "class")},
    ),
    Format("text", "documents", spellings.document, {"text": ("text", "content", "document", "article", "body")}),
    Format(
        "prompt", "prompts", spellings.prompt,
        {"prompt": _PROMPT}, {"answer": ("answer", "solution", "target"), **_OPENING},
    ),
)  # fmt: skip
"""In the order in which they are tried."""


def detect(path: Path, kind: str = "") -> Format:
    """The format of a raw file (of a folder's first one) from its first rows, among those that yield `kind`.

    Raises FledgeError where the rows fit none, naming the line and the key that comes nearest.
    """
    file = files_in(path)[0]
    return _detect(file, _sample(rows_of(file)), kind)


def load(path: Path, kind: str, rejects: Rejects | None = None) -> Iterator[Record]:
    """Records of `kind` from a raw file or folder, as a stream; conversations may be taken as documents.

    Rows that cannot be used go to `rejects`; without one they are counted in a warning at the end. Raises FledgeError
    with the first problems where a file has not one usable row.
    """
    for file in files_in(path):
        yield from _load_file(file, kind, rejects)


def _load_file(file: Path, kind: str, rejects: Rejects | None) -> Iterator[Record]:
    rows = rows_of(file)
    sample = _sample(rows)
    form = _detect(file, sample, kind)
    problems: list[Problem] = []
    refused = used = 0
    for row in chain(sample, rows):
        record = _try(form, row)
        if not isinstance(record, Reason):
            used += 1
            yield as_document(record) if isinstance(record, Conversation) and kind == "documents" else record
            continue
        refused += 1
        if len(problems) < _PROBLEMS:
            problems.append(Problem(record.said(), where=_full(file, row)))
        if rejects is not None:
            rejects.add(STEP, record.said("en"), row=row.text, where=row.where)
    if not used:
        raise FledgeError(*problems)
    if refused and rejects is None:
        first, total = f"{problems[0].where}: {problems[0].what}", refused + used
        counted = t("{refused} of {total} rows were set aside", refused=refused, total=total)
        log.warning("%s: %s; %s", file, counted, first)


def _try(form: Format, row: RawRow) -> Record | Reason:
    """The row's record, or why it has none."""
    if row.error:
        return row.error
    try:
        record = form.record(row.value)
        for text in (*texts(record), *record.meta, *record.meta.values(), record.id, record.language, record.source):
            text.encode()
    except Misfit as misfit:
        return misfit.reason
    except UnicodeEncodeError:  # half a surrogate pair, or bytes of another encoding
        return NOT_UTF8
    return record


def _sample(rows: Iterator[RawRow]) -> list[RawRow]:
    """The first rows, until there are enough readable ones to tell the format."""
    sample: list[RawRow] = []
    readable = 0
    for row in rows:
        sample.append(row)
        readable += not row.error
        if readable == _SAMPLE:
            break
    return sample


def _detect(file: Path, sample: list[RawRow], kind: str) -> Format:
    wanted = [form for form in FORMATS if not kind or form.kind == kind]
    wanted += [form for form in FORMATS if kind == "documents" and form.kind == "conversations"]
    readable = [row for row in sample if not row.error]
    if not sample:
        raise FledgeError(Problem(t("the file has no rows"), where=str(file)))
    if not readable:
        fix = t("convert it, for example: iconv -f GB18030 -t UTF-8") if sample[0].error is NOT_UTF8 else ""
        errors = ((row, row.error.said()) for row in sample[:_PROBLEMS] if row.error)
        raise FledgeError(*(Problem(error, where=_full(file, row), fix=fix) for row, error in errors))

    def votes(form: Format) -> int:
        return sum(form.fits(row.value) or (form.name == "text" and isinstance(row.value, str)) for row in readable)

    best = max(wanted, key=votes)  # the first of equals
    if not votes(best):
        raise FledgeError(_no_format(file, readable[0], wanted, kind))
    return best


def _no_format(file: Path, row: RawRow, wanted: list[Format], kind: str) -> Problem:
    """Why a row fits nothing: a slip where one explains it, else by the format that misses the fewest keys."""
    allowed = "; ".join(form.needs for form in wanted)
    keys = list(row.value) if isinstance(row.value, dict) else []

    def distance(form: Format) -> float:
        """Missing keys, where one that is nearly there counts half."""
        missing = [names for names in form.required.values() if not any(name in keys for name in names)]
        return sum(0.5 if any(near(key, names) for key in keys) else 1 for names in missing)

    nearest = min(wanted, key=distance)
    other = next((form for form in FORMATS if form.fits(row.value)), None)
    if other and distance(nearest) >= 1:
        what = t("{path} holds {found} where {wanted} are wanted", path=file, found=other.kind, wanted=kind)
        return Problem(what, allowed=allowed)
    reason = _try(nearest, row)
    what = reason.said() if isinstance(reason, Reason) else ""
    return Problem(what, where=_full(file, row), found=listing([f'"{key}"' for key in keys]), allowed=allowed)


def _full(file: Path, row: RawRow) -> str:
    """`data/chat.jsonl:17` from the file and the row's own `chat.jsonl:17`."""
    return str(file.parent / row.where)


# --- and back -------------------------------------------------------------------------------------------------------


def write_format(records: Iterable[Record], format: str, file: Path) -> int:
    """Write records as JSON lines in `format` (alpaca, sharegpt, messages, preference); returns how many.

    `load` gives them back as they were. Raises FledgeError for a record the format cannot hold.
    """
    spell = WRITERS.get(format)
    if spell is None:
        what = t('no format is called "{name}"', name=format)
        raise FledgeError(Problem(what, allowed=listing([*WRITERS]), fix=did_you_mean(format, WRITERS)))
    written = 0
    with file.open("w", encoding="utf-8", newline="\n") as out:
        for record in records:
            row = spell(record)
            if row is None:
                raise FledgeError(t('the record {id} cannot be written as "{name}"', id=record.id, name=format))
            common = {"id": record.id, "language": record.language, "source": record.source, "meta": dict(record.meta)}
            row |= {key: value for key, value in common.items() if value}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written


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


WRITERS: dict[str, Callable[[Record], Values | None]] = {
    "alpaca": _to_alpaca,
    "sharegpt": _to_sharegpt,
    "messages": _to_messages,
    "preference": _to_preference,
}
