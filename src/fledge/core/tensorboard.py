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

    def hear(self, event: Event) -> None:
        """Keep metrics that have a step; a resumed stage's step overwrites its first point in TensorBoard's view."""
        if event.kind != "metric" or event.step is None:
            return
        from tensorboard.compat.proto import event_pb2, summary_pb2

        value = summary_pb2.Summary.Value(tag=event.name, simple_value=float(event.value))
        summary = summary_pb2.Summary(value=[value])
        self._writer(event.stage).add_event(event_pb2.Event(wall_time=event.time, step=event.step, summary=summary))

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._writers[stage] = EventFileWriter(str(self.folder / stage))
        return self._writers[stage]

    def close(self) -> None:
        """Flush everything."""
        for writer in self._writers.values():
            writer.close()
