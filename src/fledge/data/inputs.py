"""A corpus as pieces of work: the row groups of its shards, raw files made into shards first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact, write_atomic
from fledge.data.passes import Rows
from fledge.data.refine import chunks_of
from fledge.records.rejects import Rejects
from fledge.records.shards import ShardWriter, kind_in, read, shards_of

DONE = "done.json"


def rows_of(data: Artifact, folder: Path, told: Callable[[int], Any] = lambda rows: None) -> tuple[str, list[Rows]]:
    """The kind of a corpus and its chunks in order. Raw files become shards below `folder`, once; what cannot be read
    of them is kept in `folder/rejected`."""
    kind = kind_in(data)
    if not shards_of(data):
        done = folder / DONE
        if not done.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            with Rejects(folder) as rejects, ShardWriter(folder, kind) as writer:
                for record in read(data, kind, rejects):
                    writer.write(record)
                    told(writer.rows)
            write_atomic(done, "{}")
        data = Artifact(folder)
    return kind, chunks_of(data)


def set_aside(folders: Iterable[Path], out: Path) -> dict[str, dict[str, int]]:
    """Keep what `rows_of` could not read below `out` as well. Returns the counts by step and reason."""
    with Rejects(out) as rejects:
        for folder in folders:
            rejects.take_from(folder)
    return rejects.reasons


def made_once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `make` noted about the folder it filled; the folder is there whole, or not at all."""
    done = folder / DONE
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    making = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    notes = make(making)
    (making / DONE).write_text(json.dumps(notes, ensure_ascii=False, sort_keys=True), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return notes


def keep(file: Path, target: Path) -> None:
    """The file at another place as well: as a second name where the file system has those, else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
