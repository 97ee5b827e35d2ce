"""Python that nobody has read, as a model writes it, run where it can do no harm.

    run_python("print(6 * 7)").output        # "42\\n"

Around the program stand Linux namespaces: it has no network at all, sees no process but its own, and a file system of
its own that holds the interpreter, the standard library (both read-only) and one empty folder in memory. It has no
environment and no rights, its memory, processor time, files and processes are limited, and all that it started is gone
when it ends or its time is up. `confine.py` builds the walls from inside.

Where the kernel does not allow this (not Linux, a container without user namespaces) nothing is run: an error says so.
A program that is stopped for its time is the one thing here that a clock decides.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t

_REFUSED = 97
"""The exit status by which `confine.py` says that the walls could not be built."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """by the clock, then it is killed"""
    cpu_seconds: int = 5
    """of one process"""
    memory: int = 256 * 2**20
    """bytes of address space of one process"""
    processes: int = 4
    """with their threads"""
    disk: int = 16 * 2**20
    """bytes of all files together; they lie in memory"""
    files: int = 32
    """open at once"""
    output: int = 64 * 2**10
    """bytes of output, and of errors; what is more is cut off"""


@dataclass(frozen=True)
class Ran:
    """How a program ended. `status`: "ok", "error" (an exception, a signal, a limit) or "timeout" (its time by the
    clock or the processor's was up)."""

    output: str
    errors: str
    status: Literal["ok", "error", "timeout"]


def run_python(code: str, limits: Limits | None = None) -> Ran:
    """Run a Python program in the sandbox. Raises FledgeError where this machine cannot confine it."""
    limits = limits or Limits()
    if sys.platform != "linux":
        raise _refusal(sys.platform)
    order = json.dumps({"code": code, "python": _python(), "limits": asdict(limits), "parent": os.getpid()}).encode()
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("confine.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/"
    ) as process:
        try:
            output, errors, late = _talk(process, order, limits)
        finally:
            process.kill()  # its death is that of everything inside
        status = process.wait()
    if status == _REFUSED:
        raise _refusal(errors.decode(errors="replace").strip())
    late = late or status == 128 + signal.SIGXCPU
    ended: Literal["ok", "error", "timeout"] = "timeout" if late else "ok" if status == 0 else "error"
    return Ran(output.decode(errors="replace"), errors.decode(errors="replace"), ended)


def refuse_unless_confined() -> None:
    """Raise what `run_python` would raise where this machine cannot confine a program."""
    if reason := why_not():
        raise _refusal(reason)


@cache
def why_not() -> str:
    """Why no program can be confined on this machine; "" where it can."""
    try:
        ran = run_python("print(6 * 7)", Limits(seconds=20))
    except FledgeError as error:
        return error.problems[0].found or str(error)
    return "" if ran.output.strip() == "42" else ran.errors.strip() or ran.status


def _talk(process: subprocess.Popen[bytes], order: bytes, limits: Limits) -> tuple[bytes, bytes, bool]:
    """(output, errors, whether the time was up). Reads no more than the limits allow, however much is written."""
    assert process.stdin and process.stdout and process.stderr
    try:
        process.stdin.write(order)
        process.stdin.close()
    except BrokenPipeError:  # the walls could not be built: its errors say why
        pass
    end = time.monotonic() + limits.seconds
    heard: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    waiting = set(heard)
    while waiting:
        left = end - time.monotonic()
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, left))
        if not ready or left <= 0:
            return *map(bytes, heard.values()), True  # type: ignore[return-value]
        for pipe in ready:
            if piece := os.read(pipe, 65536):
                heard[pipe] += piece[: max(0, limits.output - len(heard[pipe]))]
            else:
                waiting.discard(pipe)
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return *map(bytes, heard.values()), True  # type: ignore[return-value]
    return *map(bytes, heard.values()), False  # type: ignore[return-value]


@cache
def _python() -> dict[str, object]:
    """The interpreter inside, and the folders and files that it needs, as they are on this machine."""
    base = Path(sys.base_prefix)
    real = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    loader = (Path(name) for name in ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"))
    needed = [real, base / "lib", base / "lib64", *loader]
    return {"executable": str(real), "needs": [str(path) for path in needed if path.exists()]}


def _refusal(found: str) -> FledgeError:
    return FledgeError(
        Problem(
            t("programs written by a model are not run: this machine cannot confine them"),
            found=found,
            fix=t("allow user namespaces (kernel.unprivileged_userns_clone=1; in a container a seccomp profile with "
                  "unshare), or do without this tool"),
        )
    )  # fmt: skip
