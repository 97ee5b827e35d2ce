"""What a step sets aside, kept beside its output with the step's name, the reason and the row itself.

    with Rejects(job.out) as rejects:
        rejects.add("quality", "too few letters", value="0.12", row=document.text, where=document.id)

Steps and reasons are English, whatever the user's language: they are part of the artifact.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from fledge.core.language import t
from fledge.records.shards import Parts

REJECTED = "rejected"
COLUMNS = ("step", "reason", "value", "where", "row")


class Reason:
    """Why a row cannot be used, not yet in any language: English in the rejected rows, which are part of an artifact
    and may not depend on the reader, and the user's own on the screen. Values may be reasons themselves."""

    def __init__(self, sentence: str, **values: object) -> None:
        self.sentence, self.values = sentence, values

    def said(self, lang: str | None = None) -> str:
        """The sentence in `lang`, or in the user's language."""
        values = {key: value.said(lang) if isinstance(value, Reason) else value for key, value in self.values.items()}
        return _printable(t(self.sentence, lang=lang, **values))


def _printable(text: str) -> str:
    """The text with lone surrogates, which no file and no screen takes, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def near(word: str, allowed: Iterable[str], cutoff: float = 0.6) -> Reason | None:
    """`did you mean "response"?`, or None when no allowed word is near."""
    found = difflib.get_close_matches(word, list(allowed), n=1, cutoff=cutoff)
    return Reason('did you mean "{word}"?', word=found[0]) if found else None


class Rejects:
    """Rows set aside, written below `folder/rejected`. Nothing is written where nothing was rejected."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._parts = Parts(folder / REJECTED, pa.schema([(name, pa.string()) for name in COLUMNS]), 20_000)
        self._reasons: Counter[tuple[str, str]] = Counter()

    def add(self, step: str, reason: str, value: str = "", row: str = "", where: str = "") -> None:
        """Keep one row: which step refused it, why, the measured value if any, the row (JSON or the raw line), and
        where it stood (`data.jsonl:17`, or an id)."""
        fields = (step, reason, value, where, row)
        self._parts.add(dict(zip(COLUMNS, map(_printable, fields), strict=True)), sum(map(len, fields)))
        self._reasons[step, reason] += 1

    def take_from(self, folder: Path) -> None:
        """Keep, behind what is kept, all rows that were set aside in another folder."""
        import pyarrow.parquet as pq

        for file in sorted((folder / REJECTED).glob("part-*.parquet")):
            with pq.ParquetFile(file) as part:
                for group in range(part.num_row_groups):
                    rows = part.read_row_group(group)
                    self._parts.add_table(rows)
                    self._reasons.update(zip(rows["step"].to_pylist(), rows["reason"].to_pylist(), strict=True))

    @property
    def counts(self) -> dict[str, int]:
        """Rejected rows by step."""
        by_step: Counter[str] = Counter()
        for (step, _), rows in self._reasons.items():
            by_step[step] += rows
        return dict(sorted(by_step.items()))

    @property
    def reasons(self) -> dict[str, dict[str, int]]:
        """Rejected rows by step and reason."""
        return {
            step: {reason: rows for (of, reason), rows in sorted(self._reasons.items()) if of == step}
            for step in self.counts
        }

    def close(self) -> None:
        """Finish the last file."""
        self._parts.close(even_if_empty=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_rejects(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows set aside in an artifact's folder: dicts of `step`, `reason`, `value`, `where`, `row`."""
    from fledge.records.shards import _rows

    return _rows(sorted((folder / REJECTED).glob("part-*.parquet")))
