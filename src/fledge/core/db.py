"""The one mutable place: the index of runs, digests already taken, rates measured. SQLite, safe for many processes.

Nothing here is needed to trust an artifact; when the file is lost, runs are listed no more and digests are taken again.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fledge.core.artifact import sha256_of

_SCHEMA = """
CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, sha256 TEXT);
CREATE TABLE IF NOT EXISTS runs (name TEXT PRIMARY KEY, recipe TEXT, created REAL, finished REAL, status TEXT);
CREATE TABLE IF NOT EXISTS run_stages (
  run TEXT, position INTEGER, name TEXT, use TEXT, status TEXT, seconds REAL, fingerprint TEXT, path TEXT, facts TEXT,
  PRIMARY KEY (run, name)
);
CREATE TABLE IF NOT EXISTS rates (name TEXT, value REAL, time REAL);
"""


@dataclass(frozen=True)
class RunRow:
    """One run as the index knows it."""

    name: str
    recipe: str
    created: float
    finished: float | None
    status: str


@dataclass(frozen=True)
class StageRow:
    """One stage of a run. `facts` holds what the plan and the runner knew: inputs, estimate, description."""

    name: str
    use: str
    status: str
    seconds: float
    fingerprint: str
    path: str
    facts: dict[str, Any]


class Database:
    """`fledge.db`. Every method is one transaction."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        with self._open() as db:
            db.executescript(_SCHEMA)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.file, timeout=30)
        try:
            with db:
                yield db
        finally:
            db.close()

    def digest(self, file: Path) -> str:
        """SHA-256 of a file, remembered by path, size and time of change."""
        stat = file.stat()
        key = str(file.resolve())
        with self._open() as db:
            row = db.execute("SELECT size, mtime, sha256 FROM digests WHERE path = ?", (key,)).fetchone()
        if row and row[:2] == (stat.st_size, stat.st_mtime_ns):
            return str(row[2])
        digest = sha256_of(file)
        with self._open() as db:
            db.execute("REPLACE INTO digests VALUES (?, ?, ?, ?)", (key, stat.st_size, stat.st_mtime_ns, digest))
        return digest

    def start_run(self, name: str, recipe: str, stages: list[StageRow]) -> None:
        """Enter a run with all its stages, replacing what an earlier run of the same name left."""
        with self._open() as db:
            old = db.execute("SELECT created FROM runs WHERE name = ?", (name,)).fetchone()
            db.execute(
                "REPLACE INTO runs VALUES (?, ?, ?, NULL, 'running')", (name, recipe, old[0] if old else time.time())
            )
            db.execute("DELETE FROM run_stages WHERE run = ?", (name,))
            for position, stage in enumerate(stages):
                db.execute(
                    "INSERT INTO run_stages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (name, position, *_values(stage))
                )

    def set_stage(self, run: str, stage: StageRow) -> None:
        """What became of one stage."""
        with self._open() as db:
            db.execute(
                "UPDATE run_stages SET name=?, use=?, status=?, seconds=?, fingerprint=?, path=?, facts=? "
                "WHERE run=? AND name=?",
                (*_values(stage), run, stage.name),
            )

    def finish_run(self, name: str, status: str) -> None:
        with self._open() as db:
            db.execute("UPDATE runs SET finished = ?, status = ? WHERE name = ?", (time.time(), status, name))

    def runs(self) -> list[RunRow]:
        """All runs, the newest first."""
        with self._open() as db:
            rows = db.execute(
                "SELECT name, recipe, created, finished, status FROM runs ORDER BY created DESC"
            ).fetchall()
        return [RunRow(*row) for row in rows]

    def stages(self, run: str) -> list[StageRow]:
        """The stages of a run in the order in which they run."""
        wanted = "name, use, status, seconds, fingerprint, path, facts"
        with self._open() as db:
            rows = db.execute(f"SELECT {wanted} FROM run_stages WHERE run = ? ORDER BY position", (run,)).fetchall()
        return [
            StageRow(name, use, status, seconds, fingerprint, path, json.loads(facts))
            for name, use, status, seconds, fingerprint, path, facts in rows
        ]

    def add_rate(self, name: str, value: float) -> None:
        """Remember how fast this machine did some kind of work (units per second)."""
        with self._open() as db:
            db.execute("INSERT INTO rates VALUES (?, ?, ?)", (name, value, time.time()))

    def rate(self, name: str) -> float | None:
        """The median of the last nine measurements, or None."""
        with self._open() as db:
            rows = db.execute("SELECT value FROM rates WHERE name = ? ORDER BY time DESC LIMIT 9", (name,)).fetchall()
        return median(row[0] for row in rows) if rows else None


def _values(stage: StageRow) -> tuple[Any, ...]:
    facts = json.dumps(stage.facts, ensure_ascii=False)
    return stage.name, stage.use, stage.status, stage.seconds, stage.fingerprint, stage.path, facts
