"""Where artifacts live. A finished one is renamed into `artifacts/` whole and never changed again.

artifacts/<use>-<fingerprint>/   complete and immutable
work/<fingerprint>/              an unfinished stage: out/, checkpoints, events, log.txt
runs/<name>/                     links to a run's artifacts by stage name, its events and its report
fledge.db                        everything mutable
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fledge.core.artifact import EVENTS, KINDS, MANIFEST, Artifact, digest_of, files_of, sha256_of, write_atomic
from fledge.core.db import Database
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t

SHORT = 16  # hex digits of a fingerprint in a folder's name


def home() -> Path:
    """`$FLEDGE_HOME`, or `.fledge` in the working folder."""
    return Path(os.environ.get("FLEDGE_HOME") or ".fledge").expanduser().absolute()


class Store:
    """All artifacts below one home."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or home()
        self.artifacts, self.work, self.runs = self.root / "artifacts", self.root / "work", self.root / "runs"
        for folder in (self.artifacts, self.work, self.runs):
            folder.mkdir(parents=True, exist_ok=True)
        self.db = Database(self.root / "fledge.db")

    def path(self, use: str, fingerprint: str) -> Path:
        """Where the artifact is, or will be."""
        return self.artifacts / f"{use}-{fingerprint[:SHORT]}"

    def has(self, use: str, fingerprint: str) -> bool:
        """Whether the artifact is complete."""
        return (self.path(use, fingerprint) / MANIFEST).is_file()

    def work_folder(self, fingerprint: str) -> Path:
        """The folder of an unfinished stage."""
        return self.work / fingerprint[:SHORT]

    @contextmanager
    def lock(self, fingerprint: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Nobody else makes this artifact meanwhile. Yields the lock's descriptor, which a child inherits,
        so that the lock lasts as long as anybody still writes, even after the runner was killed."""
        folder = self.work_folder(fingerprint)
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        os.set_inheritable(descriptor, True)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def commit(self, use: str, fingerprint: str, manifest: dict[str, Any]) -> Path:
        """Turn `work/<fingerprint>/out` into the artifact: digests, `artifact.json`, one rename."""
        work, target = self.work_folder(fingerprint), self.path(use, fingerprint)
        out = work / "out"
        files = {n: {"sha256": sha256_of(out / n), "size": (out / n).stat().st_size} for n in files_of(out)}
        for name in files:
            _seal(out / name)
        payload = digest_of({name: entry["sha256"] for name, entry in files.items()})
        write_atomic(
            out / MANIFEST, json.dumps({**manifest, "payload": payload, "files": files}, ensure_ascii=False, indent=1)
        )
        if target.exists():
            shutil.rmtree(target)
        out.replace(target)
        _sync_folder(target.parent)
        shutil.rmtree(work, ignore_errors=True)
        return target

    def discard(self, use: str, fingerprint: str) -> None:
        """Forget an artifact, the manifest first: what is left after a crash counts as absent."""
        target = self.path(use, fingerprint)
        (target / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)

    def open(self, folder: Path, part: str = "") -> Artifact:
        """The typed artifact in a folder of this store."""
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        output = manifest["outputs"][part]
        return KINDS[output["kind"]](folder / output["path"] if output["path"] else folder, output.get("metrics", {}))

    def link(self, run: str, name: str, artifact: Path) -> None:
        """Make `runs/<run>/<name>` point at an artifact."""
        link = self.runs / run / name
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{name}.{os.getpid()}-{threading.get_ident()}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(artifact, link.parent))
        temporary.replace(link)


def verify(folder: Path) -> list[Problem]:
    """Everything that is not as `artifact.json` says: files changed, missing or added."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    problems = []
    present = set(files_of(folder))
    for name, entry in manifest["files"].items():
        if name not in present:
            problems.append(Problem(t("a file of the artifact is missing"), where=str(folder / name)))
        elif sha256_of(folder / name) != entry["sha256"]:
            problems.append(Problem(t("a file of the artifact was changed"), where=str(folder / name)))
    problems += [
        Problem(t("a file lies in the artifact that does not belong to it"), where=str(folder / name))
        for name in sorted(present - set(manifest["files"]))
    ]
    return problems


def garbage(store: Store) -> list[Path]:
    """Artifacts and work folders that no run refers to, and that nobody is making."""
    kept = {Path(stage.path) for run in store.db.runs() for stage in store.db.stages(run.name) if stage.path}
    wanted = {s.fingerprint[:SHORT] for run in store.db.runs() for s in store.db.stages(run.name)}
    unused = [folder for folder in sorted(store.artifacts.iterdir()) if folder not in kept]
    for folder in sorted(p for p in store.work.iterdir() if p.is_dir() and p.name not in wanted):
        with store.lock(folder.name) as _:
            unused.append(folder)
    return unused


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())


def find_model(name: str, store: Store, prefer: tuple[str, ...] = ("model", "adapter")) -> Path:
    """The model folder that `name` means: a folder, `RUN/STAGE`, or a run (its last model)."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return folder.resolve()
    run, _, stage = name.partition("/")
    rows = [
        row for row in store.db.stages(run) if row.status in ("made", "cached") and (not stage or row.name == stage)
    ]
    for artifact in (Path(row.path) for row in reversed(rows)):
        manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
        for output in manifest["outputs"].values():
            if output["kind"] in prefer:
                return artifact / str(output["path"])
    known = [r.name for r in store.db.runs()]
    raise FledgeError(
        Problem(
            t('"{name}" is neither a model folder nor a run with a model', name=name),
            allowed=t("a folder with config.json, or one of the runs: {runs}", runs=", ".join(known) or "—"),
            fix=t("run: fledge run"),
        )
    )


def _seal(file: Path) -> None:
    file.chmod(stat.S_IMODE(file.stat().st_mode) & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["EVENTS", "Store", "find_model", "folder_size", "garbage", "home", "verify"]
