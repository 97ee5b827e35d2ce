"""A server that we start ourselves: on a free port of this machine, waited for, stopped by its process id."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fledge.core.errors import Problem
from fledge.core.language import t
from fledge.inference.engines.errors import EngineError

Tell = Callable[[str], None]
_LINES = 12
"""of its log, in the error that says why it did not start"""
_GRACE = 10.0
"""seconds that it has to stop by itself"""
_RUNNING: weakref.WeakSet[ServerProcess] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for process in list(_RUNNING):
        process.stop()


class DidNotStart(EngineError):
    """The program is not there, ended at once, or was not ready in time."""


class ServerProcess:
    """A program that serves HTTP, in a session of its own: Ctrl-C here is not meant for it."""

    def __init__(self, name: str, command: Sequence[str | Path], variables: Mapping[str, str] | None = None) -> None:
        """Start `command`. Raises DidNotStart when there is no such program."""
        self.name = name
        with tempfile.NamedTemporaryFile(prefix=f"fledge-{name}-", suffix=".log", delete=False) as stream:
            self.log = Path(stream.name)
            try:
                self._process = subprocess.Popen(
                    [str(word) for word in command],
                    stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                    env={**os.environ, **(variables or {})},
                )  # fmt: skip
            except OSError as error:
                self.log.unlink(missing_ok=True)
                what = t("{engine} cannot be started", engine=name)
                raise DidNotStart(Problem(what, str(command[0]), found=error.strerror or str(error))) from None
        _RUNNING.add(self)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def wait(self, ready: Callable[[], bool], seconds: float = 900.0, tell: Tell | None = None) -> None:
        """Return when `ready()`. Raises DidNotStart, with the end of the log, when it ends first or takes too long;
        it is stopped then."""
        tell, begun, told = tell or progress, time.monotonic(), -1
        try:
            while not ready():
                passed = time.monotonic() - begun
                status = self._process.poll()
                if status is not None or passed > seconds:
                    found = t("{n} s", n=round(passed)) if status is None else t("exit status {n}", n=status)
                    last = "\n".join(self.last_lines())
                    what = t("{engine} did not start", engine=self.name)
                    raise DidNotStart(Problem(what, found=found, fix=t("the end of its log:") + f"\n{last}"))
                if int(passed) > max(told, 1):
                    told = int(passed)
                    line = (self.last_lines(1) or [""])[0]
                    tell(t("{engine} is starting, {n} s: {line}", engine=self.name, n=told, line=line))
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise
        finally:
            tell("")

    def last_lines(self, count: int = _LINES) -> list[str]:
        """The end of what it printed."""
        with suppress(FileNotFoundError), self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - 8192))
            lines = stream.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
            return [line.rstrip() for line in lines if line.strip()][-count:]
        return []

    def stop(self) -> None:
        """Ask it to end, and make it when it does not. What it started ends with it."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, sign)
            try:
                self._process.wait(_GRACE)
                break
            except subprocess.TimeoutExpired:
                continue
        with suppress(ProcessLookupError, PermissionError):  # workers that outlived it
            os.killpg(self._process.pid, signal.SIGKILL)
        self.log.unlink(missing_ok=True)
        _RUNNING.discard(self)


def free_port() -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def progress(message: str) -> None:
    """One line of the console that changes; an empty message takes it away. Nothing where there is no console."""
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        sys.stderr.write("\r\x1b[2K" + message[:width])
        sys.stderr.flush()
