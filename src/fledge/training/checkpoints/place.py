"""Where checkpoints lie: a folder of this machine, or a URL of an object store that fsspec knows.

A checkpoint is a named set of files and a manifest, which is written last: without it there is no checkpoint. In a
folder everything is written beside, synced and renamed; a store has no renaming, and there the manifest's appearing is
what counts. With several processes all of them see the same place; the first one begins, commits and removes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from fledge.core.language import t
from fledge.core.remote import file_system, speaking

MANIFEST = "checkpoint.json"
PIECE = 1 << 22  # bytes read at once
AT_ONCE = 1 << 28  # bytes fetched from a store in one go


class Place(Protocol):
    """Where the checkpoints of one run lie. Names are those of checkpoints, files lie in them."""

    def names(self) -> list[str]:
        """Every checkpoint there is, in order of its name."""

    def create(self, name: str, file: str) -> AbstractContextManager[Any]:
        """A context in which one of its files can be written; left in peace, the file is safe on its medium."""

    def commit(self, name: str, manifest: str) -> None:
        """The checkpoint exists from here on, whole; one of the same name is replaced."""

    def manifest(self, name: str) -> str:
        """What was committed. Raises FileNotFoundError, and UnicodeDecodeError where it was damaged."""

    def digest(self, name: str, file: str) -> str:
        """SHA-256 of a file, in hex. Raises FileNotFoundError."""

    def read(self, name: str, file: str, ranges: Sequence[tuple[int, int]]) -> Iterator[Any]:
        """The bytes of these ranges of a file, writable, in order."""

    def remove(self, name: str) -> None:
        """Take a checkpoint away, so that half of it is never seen."""

    def tidy(self) -> None:
        """Take away what was begun and never committed."""


def place_of(text: str | Path) -> Place:
    """The place that a path or a URL names. Raises FledgeError for a URL that nothing here can open."""
    scheme, separator, _ = str(text).partition("://")
    if scheme == "file" and separator:
        return Folder(Path(unquote(urlsplit(str(text)).path)))
    return Store(str(text)) if separator else Folder(Path(text))


class Folder:
    """A folder: `NAME/` is whole, `.NAME.tmp/` is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.path.glob("[!.]*") if entry.is_dir())

    @contextmanager
    def create(self, name: str, file: str) -> Iterator[Any]:
        self._making(name).mkdir(parents=True, exist_ok=True)
        with (self._making(name) / file).open("wb", buffering=0) as stream:
            yield stream
            os.fsync(stream.fileno())

    def commit(self, name: str, manifest: str) -> None:
        with self.create(name, MANIFEST) as stream:
            stream.write(manifest.encode())
        _sync(self._making(name))
        self.remove(name)
        self._making(name).rename(self.path / name)
        _sync(self.path)

    def manifest(self, name: str) -> str:
        return (self.path / name / MANIFEST).read_text(encoding="utf-8")

    def digest(self, name: str, file: str) -> str:
        with (self.path / name / file).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def read(self, name: str, file: str, ranges: Sequence[tuple[int, int]]) -> Iterator[Any]:
        with (self.path / name / file).open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        for begin, end in ranges:  # whoever keeps a piece keeps the mapping
            yield memoryview(mapped)[begin:end]

    def remove(self, name: str) -> None:
        going = self.path / f".{name}.gone.tmp"
        with suppress(FileNotFoundError):
            (self.path / name).rename(going)
            shutil.rmtree(going)

    def tidy(self) -> None:
        for entry in self.path.glob(".*.tmp"):
            shutil.rmtree(entry)

    def _making(self, name: str) -> Path:
        return self.path / f".{name}.tmp"


class Store:
    """A URL of an object store (`s3://bucket/key`, `gs://…`, `az://…`, `memory://…`)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.system, root = file_system(url)
        self.root = root.rstrip("/")

    def names(self) -> list[str]:
        with speaking(self.url), suppress(FileNotFoundError):
            listed = self.system.ls(self.root, detail=False, refresh=True)
            return sorted({path.rstrip("/").rpartition("/")[2] for path in listed} - {""})
        return []

    @contextmanager
    def create(self, name: str, file: str) -> Iterator[Any]:
        with speaking(self.url, t("cannot be written")):
            self.system.makedirs(f"{self.root}/{name}", exist_ok=True)
            with self.system.open(f"{self.root}/{name}/{file}", "wb") as stream:
                yield stream

    def commit(self, name: str, manifest: str) -> None:
        with speaking(self.url, t("cannot be written")):
            self.system.pipe_file(f"{self.root}/{name}/{MANIFEST}", manifest.encode())

    def manifest(self, name: str) -> str:
        with self._asking(name, MANIFEST):
            return bytes(self.system.cat_file(f"{self.root}/{name}/{MANIFEST}")).decode()

    def digest(self, name: str, file: str) -> str:
        seen = hashlib.sha256()
        with self._asking(name, file), self.system.open(f"{self.root}/{name}/{file}", "rb") as stream:
            while piece := stream.read(PIECE):
                seen.update(piece)
        return seen.hexdigest()

    def read(self, name: str, file: str, ranges: Sequence[tuple[int, int]]) -> Iterator[Any]:
        path, waiting, size = f"{self.root}/{name}/{file}", list[tuple[int, int]](), 0
        for index, (begin, end) in enumerate(ranges):
            waiting.append((begin, end))
            size += end - begin
            if size >= AT_ONCE or index == len(ranges) - 1:
                with self._asking(name, file):
                    found = self.system.cat_ranges(
                        [path] * len(waiting), [b for b, _ in waiting], [e for _, e in waiting], on_error="raise"
                    )
                yield from map(bytearray, found)
                waiting, size = [], 0

    def remove(self, name: str) -> None:
        with speaking(self.url):
            for path in (f"{self.root}/{name}/{MANIFEST}", f"{self.root}/{name}"):
                with suppress(FileNotFoundError):
                    self.system.rm(path, recursive=True)

    def tidy(self) -> None:
        """Nothing: whatever was never committed is written over, and a listing of keys costs money."""

    @contextmanager
    def _asking(self, name: str, file: str) -> Iterator[None]:
        """What is not there is not there; whatever else goes wrong is said."""
        with speaking(self.url):
            missing = not self.system.exists(f"{self.root}/{name}/{file}")
        if missing:
            raise FileNotFoundError(f"{self.url}/{name}/{file}")
        with speaking(self.url):
            yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
