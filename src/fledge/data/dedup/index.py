"""The sketches of a corpus kept in its artifact, so that a later corpus is compared with it without reading it again.

    index/00-minhash/sketches.arrow      what `CorpusStep.kept` keeps, chunk by chunk
    index/00-minhash/index.json          the step with all its options, the kind of records, how many rows

What is kept was seen at the place of the step: before later steps masked names or cut texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.artifact import Artifact, write_atomic
from fledge.data.steps.base import CorpusStep, Sketches

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "index"
_FORMAT = 1  # raised when a sketch of the same text changes


def write_index(
    folder: Path, number: int, step: CorpusStep, options: Any, kind: str, sketches: Sketches, verdicts: pa.Table
) -> None:
    """Keep the sketches of a step below `folder`, an artifact's; `options` is the step as a recipe writes it."""
    import pyarrow.ipc as ipc

    place = folder / INDEX / f"{number:02d}-{step.name}"
    place.mkdir(parents=True)
    writer: Any = None
    for table in _joined(sketches.tables(), step, verdicts):
        if writer is None:
            writer = ipc.new_file(str(place / "sketches.arrow"), table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    about = {"format": _FORMAT, "step": options, "kind": kind, "rows": sketches.rows}
    write_atomic(place / "index.json", json.dumps(about, ensure_ascii=False, sort_keys=True, indent=1))


def _joined(tables: Iterable[pa.Table], step: CorpusStep, verdicts: pa.Table) -> Iterator[pa.Table]:
    """What is kept of each chunk's sketch; a chunk of which nothing is kept is left out."""
    import numpy as np

    decided = verdicts["row"].to_numpy()
    for table in tables:
        rows = table["row"].to_numpy()
        low, high = np.searchsorted(decided, (rows[0], rows[-1] + 1)) if len(rows) else (0, 0)
        kept = step.kept(table, verdicts.slice(low, high - low))
        if kept.num_rows:
            yield kept.combine_chunks()


def has_index(corpus: Artifact) -> bool:
    """Whether the corpus was refined with `keep_index`."""
    return (corpus.path / INDEX).is_dir()


def find_index(corpus: Artifact, options: Any, kind: str, scratch: Path) -> Sketches | None:
    """The sketches that the same step, with the same options, left in a corpus; None where there are none."""
    for file in sorted((corpus.path / INDEX).glob("*/index.json")):
        about = json.loads(file.read_text(encoding="utf-8"))
        if (about["format"], about["step"], about["kind"]) == (_FORMAT, options, kind):
            sketches = file.with_name("sketches.arrow")
            files = [sketches] if sketches.exists() else []
            return Sketches(files, [0] * len(files), about["rows"], scratch)
    return None
