"""Sorting out of core: records with a 64-bit key go to files by the key's first bits, each file fits into memory.

    buckets = Buckets(folder, dtype, expected=rows)
    buckets.add(records)                             # as often as needed
    for repeated in buckets.groups(): ...            # sorted; only keys that several records share

Memory holds about `_IN_MEMORY` bytes whatever the number of records, or the records of one key where they are more.
Nothing depends on the order in which records were added.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_IN_MEMORY = 2**22  # bytes of records that are held or sorted at once
_MOST_BITS = 10  # files open to one level
Records = NDArray[Any]  # of a structured dtype


class Buckets:
    """Records of a structured `dtype` whose first field is a uniformly distributed uint64. The first `identity`
    fields say which records belong together; `least` is how many must for `groups` to show them."""

    def __init__(
        self, folder: Path, dtype: np.dtype[Any], expected: int, identity: int = 1, least: int = 2, used: int = 0
    ) -> None:
        self.folder, self.dtype, self.identity, self.least, self.used = folder, dtype, identity, least, used
        self.bits = min(_MOST_BITS, 64 - used, max(0, (expected * dtype.itemsize // _IN_MEMORY).bit_length()))
        self._waiting: list[Records] = []
        self._size = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, records: Records) -> None:
        """More records, in any order."""
        if not len(records):
            return
        self._waiting.append(records)
        self._size += records.nbytes
        if self._size >= _IN_MEMORY:
            self._spill()

    def groups(self) -> Iterator[Records]:
        """Arrays of records sorted by all fields, all records of a group in one array. Each can be had once."""
        self._spill()
        for number in range(2**self.bits):
            file = self._file(number)
            if not file.exists():
                continue
            if file.stat().st_size > 4 * _IN_MEMORY and self.used + self.bits < 64:
                yield from self._finer(file)
            else:
                records = np.fromfile(file, dtype=self.dtype)
                file.unlink()
                if len(found := self._sorted(records)):
                    yield found

    def _finer(self, file: Path) -> Iterator[Records]:
        """A bucket that came out too large, cut by the next bits of its keys."""
        count = file.stat().st_size // self.dtype.itemsize
        below = Buckets(file.with_suffix(""), self.dtype, count, self.identity, self.least, self.used + self.bits)
        step = _IN_MEMORY // self.dtype.itemsize
        for start in range(0, count, step):
            below.add(np.fromfile(file, dtype=self.dtype, count=step, offset=start * self.dtype.itemsize))
        file.unlink()
        yield from below.groups()
        below.folder.rmdir()

    def _sorted(self, records: Records) -> Records:
        names = self.dtype.names or ()
        if self.least > 1:  # most keys stand alone: leave them out before sorting by all fields
            key = records[names[0]]
            order = np.argsort(key)
            ranked = key[order]
            again = ranked[1:] == ranked[:-1]
            records = records[order[np.r_[False, again] | np.r_[again, False]]]
        records = records[np.lexsort([records[name] for name in reversed(names)])]
        if self.least > 1 and self.identity > 1:
            again = ~new_group(records, names[: self.identity])[1:]
            records = records[np.r_[False, again] | np.r_[again, False]] if len(records) else records
        return records

    def _spill(self) -> None:
        if not self._waiting:
            return
        records = np.concatenate(self._waiting)
        self._waiting, self._size = [], 0
        if not self.bits:
            self._append(0, records)
            return
        key = records[(self.dtype.names or ())[0]]
        number = ((key << np.uint64(self.used)) >> np.uint64(64 - self.bits)).astype(np.uint16)  # is sorted by radix
        order = np.argsort(number, kind="stable")
        ends = np.cumsum(np.bincount(number, minlength=2**self.bits))
        start = 0
        for bucket, end in enumerate(ends.tolist()):
            if end > start:
                self._append(bucket, records[order[start:end]])
            start = end

    def _append(self, number: int, records: Records) -> None:
        with self._file(number).open("ab") as file:
            records.tofile(file)

    def _file(self, number: int) -> Path:
        return self.folder / f"{self.used:02d}-{number:04d}.bucket"


def new_group(records: Records, names: tuple[str, ...]) -> NDArray[np.bool_]:
    """(n,) where in sorted records one of the fields differs from the record before; True at the first."""
    changed = np.zeros(len(records), dtype=np.bool_)
    changed[:1] = True
    for name in names:
        changed[1:] |= records[name][1:] != records[name][:-1]
    return changed


def leaders(records: Records, names: tuple[str, ...]) -> NDArray[np.intp]:
    """(n,) for each of the sorted records the position of the first of its group."""
    first = np.flatnonzero(new_group(records, names))
    return np.repeat(first, np.diff(np.r_[first, len(records)]))
