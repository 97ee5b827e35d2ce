"""A process of a run dies, and the run goes on: torchrun starts all of them again, from the last checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fledge.core.events import Event
from tests.training.elastic_stage import train

HERE = Path(__file__).parent


def test_one_dies_and_the_run_ends_as_if_it_had_not(tmp_path: Path) -> None:
    order = {
        "name": "it", "use": "toy.elastic", "config": {}, "seed": 1, "execution": {"processes": 2, "threads": 1},
        "attempt": 0, "events": str(tmp_path / "events.jsonl"), "inputs": {}, "outside": {},
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(order))
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "FLEDGE_STAGES": "elastic_stage", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["FLEDGE_PARENT"] = str(os.getpid())
    done = subprocess.run(
        [sys.executable, "-m", "fledge.core.child", str(tmp_path / "job.json")],
        capture_output=True, text=True, timeout=180, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kind" in (tmp_path / "result.json").read_text()
    digests = {path.name: path.read_text() for path in tmp_path.glob("*-*-*")}
    assert set(digests) == {"whole-0-0", "whole-1-0", "whole-0-1", "whole-1-1", "killed-0-1", "killed-1-1"}
    assert len(set(digests.values())) == 1, digests

    # and with fewer processes: what two of them wrote, one goes on from, to the same weights but for roundings
    killed = tmp_path / "checkpoints" / "killed"
    shutil.rmtree(killed / "step-00000010")
    assert (killed / "step-00000008" / "shard-00001.safetensors").is_file()
    heard: list[Event] = []
    alone, together = train(killed, say=heard.append), train(None)
    assert [e.value for e in heard if e.kind == "message"] == ["going on after step 8"]
    for mine, other in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
