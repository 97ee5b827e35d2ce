"""Records in another spelling: any file or folder as JSON lines, JSON, CSV, Parquet, or a folder of `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError
from fledge.core.language import t
from fledge.records.kinds import Record
from fledge.records.rejects import Rejects
from fledge.records.shards import read
from fledge.records.writers import KIND_OF_FORMAT, save_to_disk, spelled, write_format

STEP = "convert"
"""The step's name among the rejected rows."""
UNSPEAKABLE = "the format cannot hold the record"


def convert(data: Artifact, format: str, out: Path, ending: str, tell: Callable[[int], Any]) -> dict[str, Any]:
    """Write the records of `data` to `out/data.<ending>` (or as `save_to_disk` does) in the spelling `format`; returns
    the metrics.

    A record that the spelling cannot hold whole (Alpaca a call of a tool, say) is set aside, not cut down. Raises
    FledgeError where not one can be written.
    """
    import json

    from fledge.records.kinds import to_row

    with Rejects(out) as rejects:

        def speakable() -> Iterator[Record]:
            for number, record in enumerate(read(data, KIND_OF_FORMAT[format], rejects), 1):
                if spelled(record, format) is not None:
                    yield record
                else:
                    row = json.dumps(to_row(record), ensure_ascii=False)
                    rejects.add(STEP, UNSPEAKABLE, format, row, record.id)
                tell(number)

        rows = (
            save_to_disk(speakable(), format, out)
            if ending == "save_to_disk"
            else write_format(speakable(), format, out / f"data.{ending}")
        )
        counts = rejects.counts
    if not rows:
        raise FledgeError(t('not one record can be written as "{name}"', name=format))
    size = sum(file.stat().st_size for file in out.glob("data*"))
    return {"rows": rows, "bytes": size, "format": format, "rejected": counts}
