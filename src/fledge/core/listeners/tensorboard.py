"""A listener that keeps curves as TensorBoard's event files: `tensorboard --logdir .fledge/runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fledge.core.events import Event


class TensorBoard:
    """One folder of event files a stage. TensorBoard is imported with the first point of a curve, not before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        self._steps: dict[str, int] = {}

    def hear(self, event: Event) -> None:
        """Keep metrics that have a step. A stage that goes on, or goes back, says so: what stands there from this
        step on is then forgotten, so that no step counts twice."""
        if event.kind != "metric" or event.step is None:
            return
        from tensorboard.compat.proto import event_pb2, summary_pb2

        writer = self._writer(event.stage)
        last = self._steps.get(event.stage)
        if event.step < last if last is not None else event.attempt > 0:
            again = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            writer.add_event(event_pb2.Event(wall_time=event.time, step=event.step, session_log=again))
        self._steps[event.stage] = event.step
        value = summary_pb2.Summary.Value(tag=event.name, simple_value=float(event.value))
        summary = summary_pb2.Summary(value=[value])
        writer.add_event(event_pb2.Event(wall_time=event.time, step=event.step, summary=summary))

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._writers[stage] = EventFileWriter(str(self.folder / stage))
        return self._writers[stage]

    def close(self) -> None:
        """Flush everything."""
        for writer in self._writers.values():
            writer.close()
