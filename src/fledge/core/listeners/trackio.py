"""A listener that keeps runs in trackio's SQLite files, in the run's folder: `TRACKIO_DIR=.fledge/runs/NAME/trackio
trackio show`. Nothing leaves the machine unless `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` is in the environment."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fledge.core.listeners.tracker import Told, Tracker


class Trackio(Tracker):
    """One project a recipe, one run a stage and making."""

    modules: ClassVar[tuple[str, ...]] = ("trackio",)

    def begin(self, told: Told, identity: str) -> tuple[Any, str]:
        trackio = self._library()
        name = identity or f"{told.stage}-{told.fingerprint[:8]}"
        with contextlib.redirect_stdout(io.StringIO()):
            run = trackio.init(
                project=told.recipe, name=name, group=told.use, config={**told.parameters, **told.tags},
                resume="allow" if identity else "never", embed=False, auto_log_cpu=False, auto_log_gpu=False,
            )  # fmt: skip
        return run, name

    def points(self, run: Any, step: int, values: Mapping[str, float], when: float) -> None:
        run.log(dict(values), step=step)

    def end(self, run: Any, status: str, step: int, metrics: Mapping[str, float], artifact: Path | None) -> None:
        if metrics:
            run.log(dict(metrics), step=step)
        with contextlib.redirect_stdout(io.StringIO()):
            self._library().finish()

    def _library(self) -> Any:
        """trackio, writing here; its folder is fixed when it is imported. It would ask the Hub who the user is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        given = {"TRACKIO_DIR": str(self.folder)} | ({"HF_HUB_OFFLINE": "1"} if local else {})
        with _environment(given):
            import trackio
        return trackio


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables, where the user has not set them, for as long as it takes."""
    mine = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
