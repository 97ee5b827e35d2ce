"""The same rows from one process, two, a Ray cluster of two nodes, and a run killed ten times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fledge.records.shards as shards
from fledge.core.artifact import Artifact
from fledge.data.inputs import DONE
from fledge.data.stages import Refine

from .conftest import Runner, digests, write
from .test_refine import STEPS, dirty

REFINE = Refine(data="a", steps=[*STEPS[:4], "exact_dedup", *STEPS[4:]])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """340 documents in chunks of ten."""
    rows = [row for seed in range(5) for row in dirty(seed)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_GROUP_ROWS", 10)
        return write(tmp_path_factory.mktemp("data") / "a", rows)


@pytest.fixture(scope="module")
def alone(data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of one process's work."""
    made = Runner(tmp_path_factory.mktemp("alone"))(REFINE, {"a": data})
    assert made.metrics["rows_out"] > 250 and len(made.metrics["rejected"]) >= 5
    return digests(made.path)


def test_two_processes(data: Artifact, alone: dict[str, str], run: Runner) -> None:
    assert digests(run(REFINE, {"a": data}, workers=2).path) == alone


def test_a_ray_cluster_of_two_nodes(
    data: Artifact, alone: dict[str, str], run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="ray is not installed (pip install 'fledge-llm[ray]')")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    store = 80 * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": store, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=1, object_store_memory=store)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        assert digests(run(REFINE, {"a": data}, executor="ray").path) == alone
    finally:
        cluster.shutdown()


SCRIPT = """
import sys
from pathlib import Path
from fledge.core.artifact import Artifact
from tests.data.conftest import Runner
from tests.data.test_scale_out import REFINE

if __name__ == "__main__":
    made = Runner(Path(sys.argv[1]))(REFINE, {"a": Artifact(Path(sys.argv[2]))}, work="work", workers=2)
    Path(sys.argv[1], "done").write_text(str(made.path))
"""


def test_killed_ten_times(data: Artifact, alone: dict[str, str], tmp_path: Path) -> None:
    script, home = tmp_path / "main.py", tmp_path / "home"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    kills = 0
    for _ in range(30):
        before = _chunks(home)
        attempt = home / f"attempt{kills}"
        process = subprocess.Popen([sys.executable, str(script), str(home), str(data.path)], env=environment)
        while process.poll() is None and not (kills < 10 and _chunks(home) > before):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            _forget(home, attempt)
        else:
            assert process.returncode == 0
            break
    assert kills == 10
    assert digests(Path((home / "done").read_text())) == alone


def _chunks(home: Path) -> int:
    return sum(1 for _ in (home / "work").glob(f"*/*/{DONE}"))


def _forget(home: Path, attempt: Path) -> None:
    """What the runner does before another attempt: the output begins empty."""
    if (home / "out1").exists():
        (home / "out1").rename(attempt)
