"""Collecting: everything that is named as a source, as records of one kind."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fledge.core.events import Emitter
from fledge.core.reference import Outside
from fledge.data.ngrams import hash64
from fledge.data.packages import read_package
from fledge.data.texts import size_of
from fledge.records.kinds import Record
from fledge.records.rejects import Rejects
from fledge.records.shards import ShardWriter, read


def records_of(source: Outside, kind: str, rejects: Rejects) -> Iterator[Record]:
    """Records from a package, a file, a folder or the files of a glob; what cannot be used goes to `rejects`."""
    if source.scheme == "package":
        yield from read_package(source, kind, rejects)
    elif any(mark in source.text for mark in "*?[") and not Path(source.text).exists():
        for name in source.files:
            yield from read(source.path / name, kind, rejects)
    else:
        yield from read(source.path, kind, rejects)


def some_of(records: Iterable[Record], limit: int, seed: int) -> list[Record]:
    """The `limit` records whose hash of id and seed is smallest, in the order in which they came.

    Which they are does not depend on the order, and a larger limit only adds to them.
    """
    keyed = ((hash64(f"{seed}:{record.id}"), number, record) for number, record in enumerate(records))
    chosen = heapq.nsmallest(limit, keyed, key=lambda item: item[:2])
    return [record for _, _, record in sorted(chosen, key=lambda item: item[1])]


def collect(
    sources: Iterable[Outside], kind: str, limit: int | None, seed: int, out: Path, events: Emitter
) -> dict[str, Any]:
    """Write the records of all sources below `out`, one source after another. Returns the metrics."""
    rows, size, languages = Counter[str](), Counter[str](), Counter[str]()
    with Rejects(out) as rejects, ShardWriter(out, kind) as writer:
        for source in sources:
            records = records_of(source, kind, rejects)
            for record in records if limit is None else some_of(records, limit, seed):
                writer.write(record if record.source else replace(record, source=source.text))
                rows[source.text] += 1
                size[source.text] += size_of(record)
                languages[record.language] += 1
                events.progress(writer.rows)
        refused = rejects.reasons
    return {
        "rows": rows.total(), "bytes": size.total(), "rows_by_source": dict(rows), "bytes_by_source": dict(size),
        "rows_by_language": dict(sorted(languages.items())), "rejected": refused,
    }  # fmt: skip
