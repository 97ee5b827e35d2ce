"""A full disk, whoever hits it: one message instead of a traceback."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from fledge.core.errors import Problem
from fledge.core.language import t
from fledge.core.units import show_bytes

STATUS = 28
"""Exit status of a stage's process that found the disk full (it may not be able to write down why)."""
_SAID = ("No space left on device", "Disk quota exceeded", "database or disk is full")  # by libraries with own errors


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that the disk is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(said in str(error) for said in _SAID):
            return True
        error = error.__cause__ or error.__context__
    return False


def full(folder: Path) -> Problem:
    """The message: where, how much is left, what to do."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    left = show_bytes(shutil.disk_usage(there).free)
    return Problem(
        t("the disk is full; what was finished is kept, nothing half-written is left"),
        where=str(folder),
        found=t("{left} left", left=left),
        fix=t("free some space, or set FLEDGE_HOME to another disk; then the same command goes on"),
    )
