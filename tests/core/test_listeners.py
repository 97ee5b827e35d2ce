"""The programs that keep curves, really installed: a run through the runner, and what their own clients read back."""

from __future__ import annotations

import os
import sqlite3
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fledge.core import stage as stages
from fledge.core.errors import FledgeError
from fledge.core.events import Event
from fledge.core.listeners import TRACKERS, chosen, flat, open_listeners
from fledge.core.listeners.tensorboard import TensorBoard
from fledge.core.listeners.tracker import Told, Tracker
from fledge.core.plan import Plan, make_plan
from fledge.core.recipe import load
from fledge.core.runner import Runner
from fledge.core.store import Store

RECIPE = """\
name: toy
seed: 3
log: [mlflow, wandb, trackio]
stages:
  words: {use: toy.words, count: 5}
  halves: {use: toy.halves, data: words}
  learn: {use: toy.learn, data: [halves.first, halves.second], train: {lr: 0.2}}
"""
EXPECTED = {step: 1.0 / step for step in range(1, 6)}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Plan, Path, dict[str, Path]]]:
    """One run with every program that is installed; the plan, the run's folder and the artifacts."""
    for name in TRACKERS:
        try:
            chosen(name)
        except FledgeError as missing:
            pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("listeners")
    here = str(Path(__file__).parent)
    mine = {"FLEDGE_STAGES": "toy", "PYTHONPATH": here, "FLEDGE_HOME": str(folder / "home")}
    patch = pytest.MonkeyPatch()
    for key, value in mine.items():
        patch.setenv(key, value)
    for key in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "TRACKIO_DIR", "FLEDGE_LOG"):
        patch.delenv(key, raising=False)
    patch.syspath_prepend(here)
    stages.all_stages.cache_clear()
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    store = Store()
    recipe = load(folder / "r.yaml")
    plan = make_plan(recipe, store)
    listeners = open_listeners(chosen(None, recipe.log), plan, store)
    assert [type(listener).__name__ for listener in listeners] == [
        "TensorBoard",
        *(t.__name__ for t in TRACKERS.values()),
    ]
    paths = Runner(plan, store, listeners).run()
    for listener in listeners:
        listener.close()
        assert not getattr(listener, "trouble", "")
    yield plan, store.runs / "toy", paths
    patch.undo()
    stages.all_stages.cache_clear()


def mlflow_client(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def mlflow_runs(folder: Path, experiment: str = "toy") -> list[Any]:
    client = mlflow_client(folder)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def wandb_history(file: Path) -> tuple[dict[int, dict[str, str]], dict[str, str], Any]:
    """History by step, config and the run of a `.wandb` file: a LevelDB log of protobuf records.

    wandb's own process may write the end of it a moment after it has said that the run is finished.
    """
    for _ in range(100):
        found, ended = wandb_records(file)
        if ended:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def wandb_records(file: Path) -> tuple[tuple[dict[int, dict[str, str]], dict[str, str], Any], bool]:
    """What a `.wandb` file holds, and whether the record of the run's end is there."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    history: dict[int, dict[str, str]] = {}
    rows: list[int] = []
    config: dict[str, str] = {}
    run, ended = None, False
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # a first or a middle part
            continue
        record, whole = Record.FromString(whole), b""
        ended |= record.WhichOneof("record_type") == "exit"
        if record.WhichOneof("record_type") == "run":
            run = record.run
            config = {item.key: item.value_json for item in record.run.config.update}
        elif record.WhichOneof("record_type") == "history":
            items = {"/".join([item.key, *item.nested_key]).strip("/"): item.value_json for item in record.history.item}
            history.setdefault(int(items["step"]), {}).update(items)
            rows.append(int(items["step"]))
    assert len(rows) == len(set(rows)), "no step twice"
    return (history, config, run), ended


def wandb_file(folder: Path) -> Path:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file


def test_mlflow_reads_the_run_back_from_its_own_database(ran: tuple[Plan, Path, dict[str, Path]]) -> None:
    plan, folder, paths = ran
    (run,) = mlflow_runs(folder / "mlflow")
    assert run.info.run_name == "words" and run.info.status == "FINISHED"
    assert run.data.params["count"] == "5" and run.data.params["execution.device"] == "auto"
    assert run.data.tags["fledge.fingerprint"] == plan.steps[0].fingerprint
    assert run.data.tags["fledge.recipe"] == "toy" and run.data.tags["fledge.artifact"] == paths["words"].as_uri()
    history = mlflow_client(folder / "mlflow").get_metric_history(run.info.run_id, "loss")
    assert {point.step: point.value for point in history} == pytest.approx(EXPECTED) and len(history) == 5
    assert run.data.metrics["final.rows"] == 5
    linked = Path(run.info.artifact_uri.removeprefix("file://")) / paths["words"].name
    assert linked.is_symlink() and linked.resolve() == paths["words"].resolve()


def test_wandb_leaves_a_file_that_its_own_format_reads(ran: tuple[Plan, Path, dict[str, Path]]) -> None:
    plan, folder, paths = ran
    history, config, run = wandb_history(wandb_file(folder / "wandb"))
    assert {step: float(items["loss"]) for step, items in history.items()} == pytest.approx(EXPECTED)
    assert config["count"] == "5" and config["fledge.fingerprint"] == f'"{plan.steps[0].fingerprint}"'
    assert run.project == "toy" and run.display_name == "words" and "toy.words" in run.tags
    assert config["fledge.artifact"] == f'"{paths["words"].as_uri()}"'
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_trackio_reads_the_run_back_from_its_own_database(ran: tuple[Plan, Path, dict[str, Path]]) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    plan, folder, _ = ran
    (record,) = SQLiteStorage.get_run_records("toy")
    assert record["name"] == f"words-{plan.steps[0].fingerprint[:8]}"
    logs = SQLiteStorage.get_logs("toy", record["name"])
    assert {row["step"]: row["loss"] for row in logs if "loss" in row} == pytest.approx(EXPECTED)
    assert sum("loss" in row for row in logs) == 5
    assert [row["final.rows"] for row in logs if "final.rows" in row] == [5]
    config = SQLiteStorage.get_run_config("toy", record["name"])
    assert config["count"] == 5 and config["fledge.fingerprint"] == plan.steps[0].fingerprint
    assert sqlite3.connect(folder / "trackio" / "toy.db").execute("SELECT COUNT(*) FROM metrics").fetchone()[0] == 6


def points(attempt: int, steps: range, stage: str = "words") -> list[Event]:
    return [
        Event("metric", stage, attempt, step, name, float(step), time=1e9 + step)
        for step in steps
        for name in ("loss", "lr")
    ]


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_stage_that_goes_on_counts_no_step_twice(
    ran: tuple[Plan, Path, dict[str, Path]], name: str, tmp_path: Path
) -> None:
    """Killed after step 5 with a checkpoint of step 2, twice; then made anew under the same fingerprint."""
    told = Told("words", "toy.words", f"again-{name}", "f" * 64, 3, {"lr": 0.1}, tmp_path / "artifact")
    folder = tmp_path / name
    for attempt, steps in ((0, range(1, 6)), (1, range(3, 8)), (2, range(3, 11))):
        tracker = TRACKERS[name]({"words": told}, folder)
        for event in points(attempt, steps):
            tracker.hear(event)
        tracker.close()
        assert tracker.trouble == ""
    expected = list(range(1, 11))
    if name == "mlflow":
        (run,) = mlflow_runs(folder, told.recipe)
        assert run.info.status == "KILLED"
        history = mlflow_client(folder).get_metric_history(run.info.run_id, "lr")
        assert sorted(point.step for point in history) == expected
    elif name == "wandb":
        parts = [wandb_history(file) for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]
        assert len({run.run_id for _, _, run in parts}) == 1 and len(parts) == 3
        assert sorted(step for history, _, _ in parts for step in history) == expected
    else:
        from trackio.sqlite_storage import SQLiteStorage

        (record,) = SQLiteStorage.get_run_records(told.recipe)
        assert [row["step"] for row in SQLiteStorage.get_logs(told.recipe, record["name"])] == expected
    tracker = TRACKERS[name]({"words": told}, folder)
    for event in points(0, range(1, 3)):
        tracker.hear(event)
    tracker.close()
    if name == "mlflow":
        assert len(mlflow_runs(folder, told.recipe)) == 2, "made anew is another run"


def test_tensorboard_forgets_what_is_made_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, steps in ((0, range(1, 6)), (1, range(3, 8))):
        board = TensorBoard(tmp_path)
        events = points(attempt, steps)
        if attempt:  # and within one attempt the run goes back to step 6
            events += [replace(event, value=10 * event.value) for event in points(1, range(6, 9))]
        for event in events:
            board.hear(event)
        board.close()
    found = EventAccumulator(str(tmp_path / "words")).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in found] == [(s, s * (10 if s > 5 else 1)) for s in range(1, 9)]


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_point_that_is_told_late_is_kept(ran: tuple[Plan, Path, dict[str, Path]], name: str, tmp_path: Path) -> None:
    """What writing a checkpoint took is known some steps later."""
    told = Told("words", "toy.words", f"late-{name}", "e" * 64, 3, {}, tmp_path / "artifact")
    tracker = TRACKERS[name]({"words": told}, tmp_path / name)
    late = Event("metric", "words", 0, 2, "checkpoint_seconds", 0.5, time=1e9 + 4)
    for event in [*points(0, range(3, 5)), late, *points(0, range(5, 7))]:
        tracker.hear(event)
    tracker.close()
    assert tracker.trouble == ""
    if name == "mlflow":
        (run,) = mlflow_runs(tmp_path / name, told.recipe)
        client = mlflow_client(tmp_path / name)
        found = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "checkpoint_seconds")}
        steps = sorted(m.step for m in client.get_metric_history(run.info.run_id, "loss"))
    elif name == "wandb":
        history, _, _ = wandb_history(wandb_file(tmp_path / name))
        found = {s: float(row["checkpoint_seconds"]) for s, row in history.items() if "checkpoint_seconds" in row}
        steps = sorted(s for s, row in history.items() if "loss" in row)
    else:
        from trackio.sqlite_storage import SQLiteStorage

        (record,) = SQLiteStorage.get_run_records(told.recipe)
        logs = SQLiteStorage.get_logs(told.recipe, record["name"])
        found = {row["step"]: row["checkpoint_seconds"] for row in logs if "checkpoint_seconds" in row}
        steps = sorted(row["step"] for row in logs if "loss" in row)
    assert found == {2: 0.5} and steps == [3, 4, 5, 6]


class Broken(Tracker):
    """A program that cannot be reached."""

    def begin(self, told: Told, identity: str) -> tuple[Any, str]:
        raise ConnectionError("no route to host")

    def points(self, run: Any, step: int, values: Any, when: float) -> None:
        raise AssertionError

    end = points  # type: ignore[assignment]


def test_a_program_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    told = Told("words", "toy.words", "toy", "f" * 64, 3, {}, tmp_path)
    tracker = Broken({"words": told}, tmp_path)
    for event in points(0, range(1, 4)):
        tracker.hear(event)
    tracker.close()
    assert tracker.trouble == "ConnectionError: no route to host"


def test_names_are_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_LOG", "wandb, tensorboard,wandb")
    with pytest.raises(FledgeError, match=r'did you mean "mlflow"'):
        chosen("mlfow")
    assert chosen("") == [] == chosen("", ["mlflow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FledgeError, match=r"fledge-llm\[monitor\]"):
        chosen(None, ["mlflow"])


def test_parameters_are_flat() -> None:
    assert flat({"a": {"b": 1, "c": [2, {"d": None}]}, "e": [], "f": {}}) == {
        "a.b": 1, "a.c.0": 2, "a.c.1.d": None, "e": [], "f": {},
    }  # fmt: skip
