"""What lies in a file or folder of records: schema, sizes, languages, lengths, variety, examples, what was rejected."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact
from fledge.core.language import t
from fledge.core.units import show_bytes
from fledge.data.inspection.sample import Chosen
from fledge.data.inspection.spot_check import SHOWN, Row, Spot, rejected_row
from fledge.data.inspection.variety import Gauge, Variety
from fledge.data.language import language_of
from fledge.data.texts import size_of, text_of, units
from fledge.records.kinds import Conversation, Labelled, Preference, Prompt, Rating, Record, schema, to_row
from fledge.records.rejects import read_rejects
from fledge.records.shards import kind_in, read

EDGES = (0, 32, 128, 512, 2_048, 8_192, 32_768, 131_072)
"""Lower edges of the histograms of lengths, in characters, units or tokens."""
_EXAMPLE = 160  # characters
_BATCH = 256  # texts that the tokenizer takes at once
_SHOWN_META = 20  # keys


@dataclass(frozen=True)
class Lengths:
    """How long texts are: totals, quantiles, and one count for each of `EDGES`."""

    total: int
    mean: float
    low: int
    median: int
    high: int
    longest: int
    histogram: list[int]

    @classmethod
    def of(cls, rows: Mapping[int, int]) -> Lengths:
        """Of the rows of each length; `low` and `high` are the 5th and the 95th of a hundred."""
        histogram, number = [0] * len(EDGES), sum(rows.values())
        for length, count in rows.items():
            histogram[bisect_right(EDGES, length) - 1] += count
        ranked = sorted(rows)
        ends = list(accumulate(rows[length] for length in ranked))  # rows up to each length
        low, median, high, longest = (
            ranked[bisect_right(ends, round(share * (number - 1)))] if number else 0 for share in (0.05, 0.5, 0.95, 1)
        )
        total = sum(length * count for length, count in rows.items())
        return cls(total, total / max(1, number), low, median, high, longest, histogram)


@dataclass(frozen=True)
class Report:
    """What `inspect` found. `lengths` has one count for each of `EDGES`, in characters; `fields` counts the rows that
    fill a field; `measured` has the lengths in characters, units and (with a tokenizer) tokens; `facts` counts what
    only this kind of record has: turns, roles, labels, ranks."""

    path: Path
    kind: str
    rows: int
    bytes: int
    fields: dict[str, int]
    languages: dict[str, int]
    lengths: list[int]
    examples: list[str]
    rejected: dict[str, dict[str, int]]
    unreadable: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, str] = field(default_factory=dict)
    meta: dict[str, int] = field(default_factory=dict)
    measured: dict[str, Lengths] = field(default_factory=dict)
    facts: dict[str, dict[str, int]] = field(default_factory=dict)
    variety: Variety = field(default_factory=lambda: Variety(0, 0, {}, []))
    spot: Spot = field(default_factory=Spot)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def to_text(self) -> str:
        """The report for a terminal."""
        return "\n".join(_lines(self))


def inspect(path: Path, examples: int = 3, tokenizer: Path | None = None, shown: int = 12, seed: int = 0) -> Report:
    """Read everything below `path` once; `shown` kept and as many rejected rows are chosen for a spot check.

    `tokenizer` is a folder with a `tokenizer.json`. Raises FledgeError where nothing there can be read as records.
    """
    import tempfile

    from fledge.records.rejects import Rejects

    look = _Look(kind_in(path), examples, shown, seed, _Tokens(tokenizer) if tokenizer else None)
    with tempfile.TemporaryDirectory() as aside:
        with Rejects(Path(aside)) as malformed:
            for record in read(path, look.kind, malformed):
                look.at(record)
            unreadable = sum(malformed.counts.values())
        refused = Chosen[Row](shown, seed)
        reasons: dict[str, Counter[str]] = {}
        for row in read_rejects(path):
            reasons.setdefault(row["step"], Counter())[row["reason"]] += 1
            refused.add(f"{row['step']} {row['where']} {row['row'][:200]}", rejected_row(row))
        for row in read_rejects(Path(aside)):
            refused.add(f"{row['where']} {row['row'][:200]}", rejected_row(row))
    return look.report(
        path, unreadable, {step: dict(counts.most_common()) for step, counts in sorted(reasons.items())}, refused.items
    )


class _Look:
    """What was seen so far of the records of one kind."""

    def __init__(self, kind: str, examples: int, shown: int, seed: int, tokens: _Tokens | None) -> None:
        self.kind, self._examples, self._tokens = kind, examples, tokens
        self.rows = self.size = 0
        self.filled, self.languages, self.meta = Counter[str](), Counter[str](), Counter[str]()
        self.facts: dict[str, Counter[str]] = {}
        self.characters, self.units = Counter[int](), Counter[int]()
        self.examples = list[str]()
        self.gauge, self.kept = Gauge(), Chosen[Row](shown, seed)

    def at(self, record: Record) -> None:
        self.rows += 1
        self.size += size_of(record)
        self.filled.update(name for name, value in to_row(record).items() if value not in ("", [], None))
        self.meta.update(list(record.meta))
        text = text_of(record)
        language = record.language or language_of(text) or "und"
        self.languages[language] += 1
        words = units(text)
        self.characters[len(text)] += 1
        self.units[len(words)] += 1
        if self._tokens:
            self._tokens.add(text)
        self.gauge.add(record, text, words, language)
        for name, value in facts_of(record):
            self.facts.setdefault(name, Counter())[value] += 1
        self.kept.add(record.id, Row(record.id, text[:SHOWN]))
        if len(self.examples) < self._examples:
            self.examples.append(" ⏎ ".join(text.splitlines())[:_EXAMPLE])

    def report(self, path: Path, unreadable: int, rejected: dict[str, dict[str, int]], refused: list[Row]) -> Report:
        measured = {"characters": Lengths.of(self.characters), "units": Lengths.of(self.units)}
        if self._tokens:
            measured["tokens"] = Lengths.of(self._tokens.counted())
        return Report(
            path, self.kind, self.rows, self.size, dict(self.filled.most_common()), dict(self.languages.most_common()),
            measured["characters"].histogram, self.examples, rejected, unreadable,
            dict(Artifact(path).manifest.get("metrics", {})),
            schema={column.name: str(column.type) for column in schema(self.kind)},
            meta=dict(self.meta.most_common(_SHOWN_META)), measured=measured,
            facts={name: _ranked(counts) for name, counts in self.facts.items()},
            variety=self.gauge.variety(), spot=Spot(self.kept.items, refused),
        )  # fmt: skip


def facts_of(record: Record) -> Iterator[tuple[str, str]]:
    """(what is counted, its value in this record): what only this kind of record has."""
    match record:
        case Conversation() | Prompt():
            yield "turns", _turns(len(record.messages))
            yield from (("roles", message.role) for message in record.messages)
            if any(message.tool_calls for message in record.messages):
                yield "tools", "with calls"
            if isinstance(record, Prompt):
                yield "answers", "given" if record.answer else "none"
        case Preference():
            yield "answers", str(len(record.answers))
            ranks = [answer.rank for answer in record.answers]
            yield "best answer", "one" if ranks.count(min(ranks)) == 1 else "tied"
            longest = max(record.answers, key=lambda answer: len(answer.content))
            yield "longest answer", "ranked first" if longest.rank == min(ranks) else "ranked lower"
        case Rating():
            yield "scores", f"{record.score:g}"
        case Labelled():
            yield "labels", record.label


def _turns(number: int) -> str:
    """Up to ten turns as they are, more in classes."""
    return str(number) if number <= 10 else "11–20" if number <= 20 else "21–50" if number <= 50 else "51+"


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    """What begins with a number in order of the numbers, names by frequency; the first thirty."""
    numbers = {value: re.match(r"-?\d+(\.\d+)?", value) for value in counts}
    if all(numbers.values()):
        return {value: counts[value] for value in sorted(counts, key=lambda v: float(numbers[v][0]))[:30]}  # type: ignore[index]
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:30])


class _Tokens:
    """Lengths in the tokens of a tokenizer, text by text but encoded in batches."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        from fledge.core.artifact import Tokenizer as Folder
        from fledge.core.errors import FledgeError, Problem

        if problem := Folder.problem_with(folder):
            raise FledgeError(Problem(t(problem), where=str(folder)))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._waiting: list[str] = []
        self._lengths: Counter[int] = Counter()

    def add(self, text: str) -> None:
        self._waiting.append(text)
        if len(self._waiting) == _BATCH:
            self._flush()

    def counted(self) -> Counter[int]:
        self._flush()
        return self._lengths

    def _flush(self) -> None:
        encoded = self._tokenizer.encode_batch(self._waiting, add_special_tokens=False)
        self._lengths.update(len(encoding.ids) for encoding in encoded)
        self._waiting = []


# --- for a terminal -------------------------------------------------------------------------------------------------


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.path}"
    size = show_bytes(report.bytes)
    yield t("{kind}: {rows} rows, {size} of text", kind=report.kind, rows=f"{report.rows:,}", size=size)
    yield t("fields: {fields}", fields=_counts(report.fields))
    if report.meta:
        yield t("keys of meta: {keys}", keys=_counts(report.meta))
    yield t("languages: {languages}", languages=_counts(report.languages) or "-")
    yield t("lengths:")
    for name, lengths in report.measured.items():
        yield "  " + t(
            "{unit}: {total} in all, mean {mean}, 90 % between {low} and {high}, longest {longest}",
            unit=unit_name(name), total=f"{lengths.total:,}", mean=f"{lengths.mean:,.0f}",
            low=f"{lengths.low:,}", high=f"{lengths.high:,}", longest=f"{lengths.longest:,}",
        )  # fmt: skip
    yield t("length in characters:")
    widest = max(report.lengths, default=0) or 1
    for low, count in zip(EDGES, report.lengths, strict=True):
        if count:
            yield f"  ≥ {low:>7,}  {count:>9,}  {'█' * max(1, round(40 * count / widest))}"
    yield from (f"{fact_name(name)}: {_counts(values)}" for name, values in report.facts.items())
    yield from _variety(report.variety)
    if report.examples:
        yield t("examples:")
        yield from (f"  · {example}" for example in report.examples)
    if report.unreadable:
        yield t("rows that could not be read: {rows}", rows=f"{report.unreadable:,}")
    if report.rejected:
        yield t("rejected:")
        for step, reasons in report.rejected.items():
            yield from (f"  {step}: {reason}  {count:,}" for reason, count in reasons.items())


def _variety(variety: Variety) -> Iterator[str]:
    yield t("variety:")
    yield "  " + t("{texts} different texts, {sources} sources", texts=f"{variety.texts:,}", sources=variety.sources)
    for language, words in variety.words.items():
        line = t(
            "{language}: {units} units, {vocabulary} different ones",
            language=language, units=f"{words.units:,}", vocabulary=f"{words.vocabulary:,}",
        )  # fmt: skip
        ratio = "" if words.type_token is None else t(", type/token {ratio}", ratio=f"{words.type_token:.2f}")
        yield f"  {line}{ratio}"
    if variety.openings:
        said = "; ".join(f"{opening} {count:,}" for opening, count in variety.openings)
        yield "  " + t("frequent openings: {openings}", openings=said)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def unit_name(name: str, lang: str | None = None) -> str:
    """What lengths are counted in, in the user's language."""
    return {
        "characters": t("characters", lang=lang),
        "units": t("words or Chinese characters", lang=lang),
        "tokens": t("tokens", lang=lang),
    }[name]


def fact_name(name: str, lang: str | None = None) -> str:
    """What is counted of one kind of record, in the user's language."""
    return {
        "turns": t("turns", lang=lang),
        "roles": t("roles", lang=lang),
        "tools": t("calls of tools", lang=lang),
        "answers": t("answers", lang=lang),
        "best answer": t("best answer", lang=lang),
        "longest answer": t("longest answer", lang=lang),
        "scores": t("scores", lang=lang),
        "labels": t("labels", lang=lang),
    }[name]
