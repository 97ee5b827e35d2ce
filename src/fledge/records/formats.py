"""Raw files into records: the spellings in which conversations, preferences, labels and texts come.

    for record in load(Path("data.jsonl"), "conversations", rejects): ...

| format | kind | keys |
|---|---|---|
| preference | preferences | prompt, chosen, rejected: texts or messages; without a prompt, what both begin with |
| comparison | preferences | prompt, two answers (`response_a`, `response_b`; `response_0`, …), the winner or a tie |
| ranking | preferences | prompt, answers, and ranks (1 is the best) or scores (higher is better) |
| ordered | preferences | prompt, and a list of outputs, the best first |
| rating | ratings | prompt, answer, score |
| judged | ratings | prompt, answer, and a label that is true or false (KTO): 1 or 0 |
| messages | conversations | messages, conversation(s), dialogue, …: role/content or from/value; system |
| alpaca | conversations | instruction, output; input, history, system |
| pair | conversations | prompt and response, question and answer, query and response, …; history, system |
| tagged | labelled | tokens and their tags (`B-PER`, `I-PER`, `O`) |
| entities | labelled | text and its entities: start, end, type |
| classification | labelled | text, label; a second text (premise and hypothesis) |
| text | documents | text |
| prompt | prompts | prompt (text or messages); answer |

The format of a file is found from its first rows; every key has its usual other names. `id`, `language`, `source` are
read where they are there; `meta` and all further keys (`task_type`, `category`, …) become the record's meta. Rows of
several formats may stand in one file as long as they make the same kind of record. A row that does not fit goes to the
rejects with its line and the key that is wrong. `records.writers` is the way back.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.records import spellings
from fledge.records.kinds import Conversation, Record, as_document, texts
from fledge.records.raw.files import NOT_UTF8, Limits, RawRow, files_in, rows_of
from fledge.records.raw.packed import Span
from fledge.records.rejects import Reason, near
from fledge.records.values import Common, Misfit, Values, as_text, kind_name, unpacked

if TYPE_CHECKING:
    from fledge.records.rejects import Rejects

log = logging.getLogger(__name__)
STEP = "read"
"""The step's name among the rejected rows."""
_SAMPLE = 100  # rows that decide a file's format
_SAMPLE_HELD = 16_000_000  # characters
_HINTED = 4  # names of a key that a slip is compared with: the usual ones
_PROBLEMS = 5  # problems shown where no row can be used
_COMMON_KEYS = ("id", "language", "lang", "source", "meta")


class Unusable(FledgeError):
    """A file of which not one row can be used; another file of the same source may do."""


@dataclass(frozen=True)
class Format:
    """One spelling of one kind of record: name → the keys it may stand under, and how the values make a record."""

    name: str
    kind: str
    build: Callable[[Values, Common], Record]
    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    agrees: Callable[[dict[str, Any]], bool] = lambda row: True

    def fits(self, row: Any) -> bool:
        """Whether every required key is there, with a value of the right shape where the name alone says too little."""
        there = isinstance(row, dict) and all(any(key in row for key in keys) for keys in self.required.values())
        return there and self.agrees(row)

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
        try:
            return self.build({name: row[key] for name, key in under.items()}, _common(row, extra))
        except Misfit as misfit:
            raise _in_the_rows_words(misfit, under) from None

    @property
    def needs(self) -> str:
        """The required keys, for messages."""
        return ", ".join(f'"{keys[0]}"' for keys in self.required.values())

    def _check_names(self, row: dict[str, Any], under: Mapping[str, str], extra: list[str]) -> None:
        """Refuse a row without a required key, and one whose unknown key is nearly the name of a missing one."""
        for name, names in {**self.required, **self.optional}.items():
            for key in [] if name in under else extra:
                # The absence of an optional key is no sign of a slip: only a very near word is taken for one.
                hint = near(key, names[:_HINTED], cutoff=0.6 if name in self.required else 0.85)
                if hint and key not in names:
                    raise Misfit('"{key}" is unknown; {hint}', key=key, hint=hint)
        for name, names in self.required.items():
            if name not in under:
                empty = next((key for key in names if key in row), None)
                raise Misfit('"{key}" is empty' if empty else '"{key}" is missing', key=empty or names[0])


def _in_the_rows_words(misfit: Misfit, under: Mapping[str, str]) -> Misfit:
    """The misfit with the row's own key in place of the format's name for it: `conversation[0]`, not `messages[0]`."""
    reason = misfit.reason
    name, rest = re.match(r"(\w*)(.*)", str(reason.values.get("key", "")), re.DOTALL).groups()  # type: ignore[union-attr]
    if under.get(name, name) == name:
        return misfit
    return Misfit(reason.sentence, **{**reason.values, "key": under[name] + rest})


def _common(row: dict[str, Any], extra: dict[str, Any]) -> Common:
    """`id`, `language` and `source`; the row's `meta` and every key no format knows, as texts."""
    meta = unpacked(row.get("meta"), dict) or {}  # a table's cell holds it as JSON
    if isinstance(meta, list) and all(isinstance(item, dict) and item.keys() == {"key", "value"} for item in meta):
        meta = {item["key"]: item["value"] for item in meta}  # as our own shards have it
    if not isinstance(meta, dict):
        meta = {"meta": meta}
    meta |= {key: value for key, value in extra.items() if value not in (None, "")}
    given = {"id": row.get("id"), "language": row.get("language", row.get("lang")), "source": row.get("source")}
    common: Common = {key: "" if value is None else as_text(value) for key, value in given.items()}
    return common | {"meta": {str(key): as_text(value) for key, value in meta.items() if value is not None}}


_PROMPT = ("prompt", "question", "instruction", "query", "messages", "conversations", "conversation", "problem")
_ANSWER = ("answer", "response", "completion", "output", "reply", "solution", "target", "回答", "答案")
_OPENING = {"system": ("system", "system_prompt"), "history": ("history",)}
_TALK = ("messages", "conversations", "conversation", "对话")
_LOOSE_TALK = ("dialogue", "dialog", "chat", "turns", "items", "data")
"""Names under which much else may stand: only a list of turns makes them a conversation."""


def _has_turns(row: dict[str, Any]) -> bool:
    """Whether a conversation stands under one of its names: for the loose ones, a list of messages or of texts."""
    if any(key in row for key in _TALK):
        return True
    if any(key in row for key in ("text", "content", "instruction", "prompt")):
        return False
    lists = [row[key] for key in _LOOSE_TALK if isinstance(row.get(key), list) and len(row[key]) > 1]
    return any(all(isinstance(turn, (str, dict)) for turn in turns) for turns in lists)


def _has_ordered_outputs(row: dict[str, Any]) -> bool:
    outputs = row.get("output", row.get("outputs"))
    return isinstance(outputs, list) and len(outputs) > 1


def _has_truth(row: dict[str, Any]) -> bool:
    return str(row.get("label")).lower() in ("true", "false")


def _has_tags(row: dict[str, Any]) -> bool:
    """Whether there is a tag, as text, for every token."""
    tokens, tags = (next((row[key] for key in keys if key in row), None) for keys in (_TOKENS, _TAGS))
    if not isinstance(tokens, list) or not isinstance(tags, list):
        return False
    return len(tokens) == len(tags) and all(isinstance(tag, str) for tag in tags)


def _has_entities(row: dict[str, Any]) -> bool:
    """Whether there is a list of entities beside a text."""
    found = next((unpacked(row[key], list) for key in _ENTITIES if key in row), None)
    return isinstance(found, list) and all(isinstance(item, dict) and "start" in item for item in found)


_TOKENS = ("tokens", "words", "chars", "characters")
_TAGS = ("tags", "ner_tags", "ner", "labels", "bio")
_ENTITIES = ("entities", "spans", "ner_spans")


FORMATS: tuple[Format, ...] = (
    Format(
        "preference", "preferences", spellings.preference,
        {"chosen": ("chosen", "chosen_response", "preferred_output", "preferred", "accepted"),
         "rejected": ("rejected", "rejected_response", "non_preferred_output", "dispreferred")},
        {"prompt": _PROMPT, "input": ("input",), **_OPENING},
    ),
    Format(
        "comparison", "preferences", spellings.comparison,
        {"a": ("response_a", "answer_a", "completion_a", "output_a", "conversation_a", "response_0", "answer_0"),
         "b": ("response_b", "answer_b", "completion_b", "output_b", "conversation_b", "response_1", "answer_1"),
         "winner": ("winner", "better_response_id", "better", "preference", "choice")},
        {"prompt": _PROMPT, "input": ("input",), **_OPENING},
    ),
    Format(
        "ranking", "preferences", spellings.ranking,
        {"prompt": _PROMPT, "answers": ("answers", "responses", "completions", "candidates")},
        {"ranks": ("ranks", "rank", "ranking"), "scores": ("scores", "score", "ratings"), **_OPENING},
    ),
    Format(
        "ordered", "preferences", spellings.ordered,
        {"prompt": _PROMPT, "answers": ("output", "outputs")}, {"input": ("input",), **_OPENING},
        _has_ordered_outputs,
    ),
    Format(
        "rating", "ratings", spellings.rating,
        {"prompt": _PROMPT, "answer": _ANSWER, "score": ("score", "rating")}, _OPENING,
    ),
    Format(
        "judged", "ratings", spellings.judged,
        {"prompt": _PROMPT, "answer": _ANSWER, "label": ("label",)}, _OPENING, _has_truth,
    ),
    Format("messages", "conversations", spellings.conversation, {"messages": (*_TALK, *_LOOSE_TALK)}, _OPENING,
           _has_turns),
    Format(
        "alpaca", "conversations", spellings.alpaca,
        {"instruction": ("instruction", "指令"), "output": ("output", "response", "answer", "输出")},
        {"input": ("input", "context", "输入"), **_OPENING},
    ),
    Format(
        "pair", "conversations", spellings.pair,
        {"prompt": ("prompt", "question", "query", "input", "problem", "问题", "提问"),
         "response": ("response", *_ANSWER)}, _OPENING,
    ),
    Format("tagged", "labelled", spellings.tagged, {"tokens": _TOKENS, "tags": _TAGS}, {}, _has_tags),
    Format(
        "entities", "labelled", spellings.entities, {"text": ("text", "sentence", "文本"), "entities": _ENTITIES}, {},
        _has_entities,
    ),
    Format(
        "classification", "labelled", spellings.labelled,
        {"text": ("text", "sentence", "content", "sentence1", "premise", "text_a", "review", "comment", "文本"),
         "label": ("label", "category", "class", "sentiment", "intent", "标签", "类别")},
        {"second": ("sentence2", "hypothesis", "text_b")},
    ),
    Format(
        "text", "documents", spellings.document,
        {"text": ("text", "content", "document", "article", "body", "raw_content", "passage", "正文", "内容")},
    ),
    Format(
        "prompt", "prompts", spellings.prompt, {"prompt": _PROMPT},
        {"answer": ("answer", "solution", "target", "ground_truth", "reference", "答案"), **_OPENING},
    ),
)  # fmt: skip
"""In the order in which they are tried."""


def detect(path: Path, kind: str = "") -> Format:
    """The format of a raw file (of a folder's first one) from its first rows, among those that yield `kind`.

    Raises FledgeError where the rows fit none, naming the line and the key that comes nearest.
    """
    file = files_in(path)[0]
    return _detect(file, _sample(rows_of(file)), kind)


def load(
    path: Path, kind: str, rejects: Rejects | None = None, limits: Limits | None = None, span: Span | None = None
) -> Iterator[Record]:
    """Records of `kind` from a raw file or folder, as a stream; conversations may be taken as documents.

    Rows that cannot be used go to `rejects`; without one they are counted in a warning at the end. Raises FledgeError
    with the first problems where a file has not one usable row. `span` is a part of one bare file of lines.
    """
    for file in files_in(path):
        yield from _load_file(file, kind, rejects, limits, span)


def _load_file(
    file: Path, kind: str, rejects: Rejects | None, limits: Limits | None, span: Span | None
) -> Iterator[Record]:
    rows = rows_of(file, limits, span)
    sample = _sample(rows)
    try:
        form = _detect(file, _sample(rows_of(file, limits)) if span and span[0] else sample, kind)
    except Unusable:
        for row in sample:
            if row.error and rejects is not None:
                rejects.add(STEP, row.error.said("en"), row.found, row=row.text, where=row.where)
        raise
    problems: list[Problem] = []
    refused = used = 0
    for row in chain(sample, rows):
        record = _try(_format_of(row, form), row)
        if not isinstance(record, Reason):
            used += 1
            yield as_document(record) if isinstance(record, Conversation) and kind == "documents" else record
            continue
        refused += 1
        if len(problems) < _PROBLEMS:
            problems.append(Problem(record.said(), where=_full(file, row), found=row.found))
        if rejects is not None:
            rejects.add(STEP, record.said("en"), row.found, row=row.text, where=row.where)
        elif row.last and used:  # what is missing behind it nobody would hear of
            raise FledgeError(Problem(t("the file cannot be read"), where=str(file), found=row.found or record.said()))
    if not used:
        raise Unusable(*problems)
    if refused and rejects is None:
        first, total = f"{problems[0].where}: {problems[0].what}", refused + used
        counted = t("{refused} of {total} rows were set aside", refused=refused, total=total)
        log.warning("%s: %s; %s", file, counted, first)


def _format_of(row: RawRow, form: Format) -> Format:
    """The file's format, or another of the same kind where only that one fits the row (files of several tasks)."""
    if row.error or form.fits(row.value):
        return form
    return next((other for other in FORMATS if other.kind == form.kind and other.fits(row.value)), form)


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
    """The first rows, until there are enough readable ones to tell the format (or enough to hold in memory)."""
    sample: list[RawRow] = []
    readable = held = 0
    for row in rows:
        sample.append(row)
        readable += not row.error
        texts_in = row.value.values() if isinstance(row.value, dict) else (row.value,)
        held += len(row.raw) or sum(len(text) for text in texts_in if isinstance(text, str))
        if readable == _SAMPLE or held > _SAMPLE_HELD:
            break
    return sample


def _detect(file: Path, sample: list[RawRow], kind: str) -> Format:
    wanted = [form for form in FORMATS if not kind or form.kind == kind]
    wanted += [form for form in FORMATS if kind == "documents" and form.kind == "conversations"]
    readable = [row for row in sample if not row.error]
    if not sample:
        raise Unusable(Problem(t("the file has no rows"), where=str(file)))
    if not readable:
        fix = t("convert it, for example: iconv -f GB18030 -t UTF-8") if sample[0].error is NOT_UTF8 else ""
        errors = ((row, row.error.said()) for row in sample[:_PROBLEMS] if row.error)
        raise Unusable(*(Problem(said, _full(file, row), row.found, fix=fix) for row, said in errors))

    def votes(form: Format) -> float:
        fit = sum(form.fits(row.value) or (form.name == "text" and isinstance(row.value, str)) for row in readable)
        return fit / 2 if form.kind == "prompts" else fit  # most of what is answered could be read as a prompt, too

    best = max(wanted, key=votes)  # the first of equals
    if not votes(best):
        raise Unusable(_no_format(file, readable[0], wanted, kind))
    return best


def _no_format(file: Path, row: RawRow, wanted: list[Format], kind: str) -> Problem:
    """Why a row fits nothing: a slip where one explains it, else by the format that misses the fewest keys."""
    allowed = "; ".join(form.needs for form in wanted)
    keys = list(row.value) if isinstance(row.value, dict) else []

    def distance(form: Format) -> float:
        """Missing keys, where one that is nearly there counts half."""
        missing = [names for names in form.required.values() if not any(name in keys for name in names)]
        return sum(0.5 if any(near(key, names[:_HINTED]) for key in keys) else 1 for names in missing)

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
