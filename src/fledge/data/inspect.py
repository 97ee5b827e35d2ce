"""What lies in a file or folder of records: kind, sizes, languages, lengths, examples, what was rejected and why."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact
from fledge.core.language import t
from fledge.core.units import show_bytes
from fledge.data.language import language_of
from fledge.data.texts import size_of, text_of
from fledge.records.kinds import to_row
from fledge.records.rejects import read_rejects
from fledge.records.shards import kind_in, read

EDGES = (0, 32, 128, 512, 2_048, 8_192, 32_768, 131_072)
"""Lower edges of the histogram of lengths, in characters."""
_EXAMPLE = 160  # characters


@dataclass(frozen=True)
class Report:
    """What `inspect` found. `lengths` has one count for each of `EDGES`; `fields` counts the rows that fill a field."""

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

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def to_text(self) -> str:
        """The report for a terminal."""
        lines = [
            f"{self.path}",
            t(
                "{kind}: {rows} rows, {size} of text",
                kind=self.kind,
                rows=f"{self.rows:,}",
                size=show_bytes(self.bytes),
            ),
            t("fields: {fields}", fields=", ".join(f"{name} {count:,}" for name, count in self.fields.items())),
            t(
                "languages: {languages}",
                languages=", ".join(f"{name} {n:,}" for name, n in self.languages.items()) or "-",
            ),
            t("length in characters:"),
        ]
        widest = max(self.lengths, default=0) or 1
        for low, count in zip(EDGES, self.lengths, strict=True):
            if count:
                lines.append(f"  ≥ {low:>7,}  {count:>9,}  {'█' * max(1, round(40 * count / widest))}")
        if self.examples:
            lines.append(t("examples:"))
            lines += [f"  · {example}" for example in self.examples]
        if self.unreadable:
            lines.append(t("rows that could not be read: {rows}", rows=f"{self.unreadable:,}"))
        if self.rejected:
            lines.append(t("rejected:"))
            for step, reasons in self.rejected.items():
                lines += [f"  {step}: {reason}  {count:,}" for reason, count in reasons.items()]
        return "\n".join(lines)


def inspect(path: Path, examples: int = 3) -> Report:
    """Read everything below `path` once. Raises FledgeError where nothing there can be read as records."""
    import tempfile

    from fledge.records.rejects import Rejects

    kind = kind_in(path)
    filled, languages = Counter[str](), Counter[str]()
    lengths, shown = [0] * len(EDGES), list[str]()
    rows = size = 0
    with tempfile.TemporaryDirectory() as aside, Rejects(Path(aside)) as malformed:
        for record in read(path, kind, malformed):
            rows += 1
            size += size_of(record)
            filled.update(name for name, value in to_row(record).items() if value not in ("", [], None))
            text = text_of(record)
            languages[record.language or language_of(text) or "und"] += 1
            lengths[bisect_right(EDGES, len(text)) - 1] += 1
            if len(shown) < examples:
                shown.append(" ⏎ ".join(text.splitlines())[:_EXAMPLE])
        unreadable = sum(malformed.counts.values())
    reasons: dict[str, Counter[str]] = {}
    for row in read_rejects(path):
        reasons.setdefault(row["step"], Counter())[row["reason"]] += 1
    return Report(
        path, kind, rows, size, dict(filled.most_common()), dict(languages.most_common()), lengths, shown,
        {step: dict(counts.most_common()) for step, counts in sorted(reasons.items())}, unreadable,
        dict(Artifact(path).manifest.get("metrics", {})),
    )  # fmt: skip
