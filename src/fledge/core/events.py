"""One stream of events. Every stage emits; console, `events.jsonl`, TensorBoard and the pages only listen.

An event is numbered by stage, attempt and (where it has one) step. A listener that keeps the last value of each
`(stage, name, step)` therefore counts nothing twice when a stage was killed and went on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

EventKind = Literal["stage", "progress", "metric", "message", "sample"]


@dataclass(frozen=True)
class Event:
    """`stage` events carry a status; `progress` done/total/unit; `metric` a value; `sample` prompt and text."""

    kind: EventKind
    stage: str
    attempt: int = 0
    step: int | None = None
    name: str = ""
    value: Any = None
    data: dict[str, Any] = field(default_factory=dict)
    time: float = 0.0

    def to_json(self) -> str:
        """One line of `events.jsonl`."""
        fields = {key: value for key, value in asdict(self).items() if value not in (None, "", {})}
        return json.dumps(fields, ensure_ascii=False, default=str)

    @classmethod
    def from_json(cls, line: str) -> Event:
        """The inverse of `to_json`."""
        return cls(**json.loads(line))


class Listener(Protocol):
    """Anything that hears the stream."""

    def hear(self, event: Event) -> None: ...


class Emitter:
    """What a stage speaks through: `job.events.progress(...)`, `.metric(...)`, `.message(...)`, `.sample(...)`."""

    def __init__(self, stage: str, attempt: int, send: Callable[[Event], None]) -> None:
        self.stage, self.attempt, self._send = stage, attempt, send
        self._lock = threading.Lock()
        self._last_progress = 0.0

    def _emit(self, kind: EventKind, **fields: Any) -> None:
        with self._lock:
            self._send(Event(kind, self.stage, self.attempt, time=time.time(), **fields))

    def progress(self, done: float, total: float | None = None, unit: str = "rows", **data: Any) -> None:
        """How far the stage is. Called as often as one likes: at most ten a second are passed on."""
        now = time.monotonic()
        if now - self._last_progress < 0.1 and done != total:
            return
        self._last_progress = now
        self._emit("progress", name=unit, value=done, data={"total": total, **data})

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """One number; with a step it is a point of a curve."""
        self._emit("metric", name=name, value=value, step=step)

    def message(self, text: str, level: Literal["info", "warning"] = "info") -> None:
        """One sentence for the person who watches."""
        self._emit("message", value=text, name=level)

    def sample(self, prompt: str, text: str, step: int | None = None) -> None:
        """A piece of text that the model wrote."""
        self._emit("sample", value=text, step=step, data={"prompt": prompt})


class JsonLines:
    """Keeps the stream in a file, a line an event."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream: IO[str] = file.open("a", encoding="utf-8")

    def hear(self, event: Event) -> None:
        self._stream.write(event.to_json() + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_events(file: Path) -> list[Event]:
    """All events of a file; a last line cut short by a crash is left out."""
    if not file.exists():
        return []
    events = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            events.append(Event.from_json(line))
        except (json.JSONDecodeError, TypeError):
            continue
    return events


def curve(events: list[Event], stage: str, name: str) -> dict[int, float]:
    """The last value heard for every step of one metric, in the order of the steps."""
    points = {
        e.step: float(e.value)
        for e in events
        if e.kind == "metric" and e.stage == stage and e.name == name and e.step is not None
    }
    return dict(sorted(points.items()))


def append_to(file: Path) -> Callable[[Event], None]:
    """A sender that appends one whole line at a time to `file`: a stage's side of the stream, read by a `Tail`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def send(event: Event) -> None:
        os.write(descriptor, (event.to_json() + "\n").encode())

    return send


class Tail:
    """Reads what has been appended to an event file since the last look."""

    def __init__(self, file: Path) -> None:
        self.file, self._offset, self._rest = file, 0, b""

    def __iter__(self) -> Iterator[Event]:
        if not self.file.exists():
            return
        with self.file.open("rb") as stream:
            stream.seek(self._offset)
            new = stream.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            yield Event.from_json(line.decode())
