"""A listener that keeps runs in MLflow, in an SQLite file of the run's folder unless `MLFLOW_TRACKING_URI` names
another place. To look at them: `mlflow ui --backend-store-uri sqlite:///.fledge/runs/NAME/mlflow/mlflow.db`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlparse

from fledge.core.listeners.tracker import Told, Tracker

_AT_ONCE = 100  # parameters in one request, MLflow's limit
_LONGEST = 6000  # characters of a parameter
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MLflow(Tracker):
    """One experiment a recipe, one run a stage; its tags find it, its parameters compare it with others."""

    modules: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")

    def begin(self, told: Told, identity: str) -> tuple[Any, str]:
        client = self._client()
        if identity:
            client.update_run(identity, status="RUNNING")
            return client.get_run(identity), identity
        known = client.get_experiment_by_name(told.recipe)
        where = None if os.environ.get("MLFLOW_TRACKING_URI") else (self.folder / "artifacts").as_uri()
        experiment = known.experiment_id if known else client.create_experiment(told.recipe, artifact_location=where)
        run = client.create_run(experiment, run_name=told.stage, tags=told.tags)
        from mlflow.entities import Param

        parameters = [Param(name, str(value)[:_LONGEST]) for name, value in told.parameters.items()]
        for start in range(0, len(parameters), _AT_ONCE):
            client.log_batch(run.info.run_id, params=parameters[start : start + _AT_ONCE])
        return run, run.info.run_id

    def points(self, run: Any, step: int, values: Mapping[str, float], when: float) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(_plain(name), value, int(1000 * when), step) for name, value in values.items()]
        self._client().log_batch(run.info.run_id, metrics=metrics)

    def end(self, run: Any, status: str, step: int, metrics: Mapping[str, float], artifact: Path | None) -> None:
        from mlflow.entities import Metric

        client, identity = self._client(), run.info.run_id
        now = int(1000 * time.time())
        client.log_batch(identity, metrics=[Metric(_plain(name), value, now, step) for name, value in metrics.items()])
        if artifact is not None:
            _link(run.info.artifact_uri, artifact)
        client.set_terminated(identity, _STATUS[status])

    def _client(self) -> Any:
        if not hasattr(self, "_made"):
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would count our calls on a server
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
            from mlflow.tracking import MlflowClient

            logging.getLogger("alembic").setLevel(logging.WARNING)
            self.folder.mkdir(parents=True, exist_ok=True)
            here = f"sqlite:///{self.folder / 'mlflow.db'}"
            self._made = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or here)
        return self._made


def _plain(name: str) -> str:
    """A curve's name in the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)


def _link(uri: str, artifact: Path) -> None:
    """The artifact among the run's, as a link, where those are files."""
    parts = urlparse(uri)
    if parts.scheme in ("", "file"):
        folder = Path(unquote(parts.path))
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / artifact.name
        if not link.is_symlink():
            link.symlink_to(artifact, target_is_directory=True)
