"""Checkpoints of one process: written while training goes on, whole or not there, on disks and in object stores."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fledge.core import disk
from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.stage import Execution
from fledge.training.checkpoints.place import Folder, place_of
from fledge.training.checkpoints.shards import FORMATS
from fledge.training.checkpoints.state import RunState
from fledge.training.checkpoints.store import Checkpoints
from fledge.training.checkpoints.writer import Snapshot
from tests.training.test_trainer import Killed, KillingSource, trainer, weights, with_dropout
from tests.training.toys import Packed, tiny

ROOT = Path(__file__).parents[2]


def run_of(seed: int = 0, kind: Any = torch.optim.AdamW) -> RunState:
    """A small model with an optimiser that has made a step."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5))
    parameters = dict(net.named_parameters())
    optimizer = kind(parameters.values(), lr=0.1)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return RunState(parameters, [optimizer])


def values(run: RunState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.tensors().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


# --- while training goes on ------------------------------------------------------------------------------------------


class Gate(Folder):
    """A place where the second piece of a file is written only once the gate is open."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.open, self.reached = threading.Event(), threading.Event()

    @contextmanager
    def create(self, name: str, file: str) -> Iterator[Any]:
        with super().create(name, file) as stream:
            gate, write = self, stream.write

            class Slow:
                pieces = 0

                def write(self, data: Any) -> int:
                    self.pieces += 1
                    if self.pieces > 3 and file.startswith("shard"):
                        gate.reached.set()
                        assert gate.open.wait(30)
                    return write(data)

            yield Slow()


def test_what_is_written_is_what_was_there_although_training_has_gone_on(tmp_path: Path) -> None:
    store, run = Checkpoints(tmp_path), run_of()
    gate = store.place = Gate(tmp_path)
    then = values(run)
    store.save(3, run, {"losses": [1.5]})
    assert gate.reached.wait(30), "the thread is in the middle of the file"
    waiter = threading.Thread(target=store.writer.settle)
    waiter.start()  # the optimiser wants to make its step: it waits for the piece in hand and copies the rest
    gate.open.set()
    waiter.join(30)
    for tensor in run.tensors().values():
        tensor.fill_(9)
    store.writer.wait()
    fresh = run_of(1)
    restored = store.restore(fresh)
    assert restored is not None and (restored.step, restored.state) == (3, {"losses": [1.5]})
    assert same(values(fresh), then)


def test_a_change_that_was_not_announced_is_noticed() -> None:
    tensor = torch.zeros(4)
    snapshot = Snapshot([tensor, torch.ones(2)])
    pieces = iter(snapshot)
    assert bytes(next(pieces)) == bytes(16)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="was changed while"):
        next(pieces)
    settled = Snapshot([tensor])
    settled.settle()
    tensor.add_(1)
    assert b"".join(settled) == torch.ones(4).numpy().tobytes()


def test_training_hardly_stands_still_and_says_for_how_long(
    tmp_path: Path, events: Emitter, heard: list[Event]
) -> None:
    trainer(tiny(), events, steps=9, folder=tmp_path, checkpoint_every=2).fit()
    told = {e.step: e.value for e in heard if e.kind == "metric" and e.name == "checkpoint_seconds"}
    assert sorted(told) == [0, 2, 4, 6, 8] and all(0 < seconds < 5 for seconds in told.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000008"]


def test_what_goes_wrong_in_the_thread_is_raised_where_training_is(tmp_path: Path, events: Emitter) -> None:
    """A disk that fills up: the house's own message, and nothing older is lost."""
    run = trainer(tiny(), events, steps=40, folder=tmp_path, checkpoint_every=3)

    class Full(Packed):
        """The disk is full from the eighth batch on."""

        def batch(self, step: int) -> Any:
            if step == 8:
                Folder._sync_before, Folder.commit = Folder.commit, full  # type: ignore[attr-defined, method-assign]
            return super().batch(step)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run.source = Full()
    try:
        with pytest.raises(OSError) as raised:
            run.fit()
    finally:
        Folder.commit = Folder._sync_before  # type: ignore[attr-defined, method-assign]
        del Folder._sync_before  # type: ignore[attr-defined]
    assert disk.is_full(raised.value)
    assert Checkpoints(tmp_path).steps() == [6, 3]
    resumed, whole = tiny(), tiny()
    trainer(resumed, events, steps=40, folder=tmp_path, checkpoint_every=3).fit()
    trainer(whole, events, steps=40).fit()
    assert weights(resumed) == weights(whole)
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_a_full_disk_of_its_own(tmp_path: Path) -> None:
    """A real file system that is too small, where one may be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        store, run = Checkpoints(small / "run"), run_of()
        store.save(1, run, {})
        store.writer.wait()
        large = RunState({"w": torch.randn(100_000)}, [])
        store.save(2, large, {})
        with pytest.raises(OSError) as raised:
            store.writer.wait()
        assert disk.is_full(raised.value) and store.steps() == [1]
        fresh = run_of(1)
        assert store.restore(fresh) is not None and same(values(fresh), values(run))
    finally:
        subprocess.run(["umount", small], check=True)


# --- whole or not there ----------------------------------------------------------------------------------------------


def test_every_way_of_being_damaged_is_noticed(tmp_path: Path) -> None:
    run, store = run_of(), Checkpoints(tmp_path)
    for step in (1, 2):
        store.save(step, run, {"tokens": 12345})
    store.writer.wait()
    folder = tmp_path / "step-00000002"
    shard, manifest = folder / "shard-00000.safetensors", folder / "checkpoint.json"
    kept = {file: file.read_bytes() for file in (shard, manifest)}
    assert store.restore(run_of(1)).step == 2  # type: ignore[union-attr]
    half = len(kept[shard]) // 2
    damages = {
        "a byte of a tensor": (shard, kept[shard][:-1] + bytes([kept[shard][-1] ^ 1])),
        "a byte of the header": (shard, kept[shard][:20] + bytes([kept[shard][20] ^ 1]) + kept[shard][21:]),
        "cut short": (shard, kept[shard][:half]),
        "empty": (shard, b""),
        "grown": (shard, kept[shard] + b"x"),
        "a number in the manifest": (manifest, kept[manifest].replace(b"12345", b"12346")),
        "no JSON": (manifest, kept[manifest][:-2]),
        "no text": (manifest, b"\xff\xfe\x00"),
        "other JSON": (manifest, b'["step"]'),
        "no manifest": (manifest, None),
        "no shard": (shard, None),
    }
    for what, (file, data) in damages.items():
        file.unlink()
        if data is not None:
            file.write_bytes(data)
        fresh = run_of(1)
        restored = store.restore(fresh)
        assert restored is not None and (restored.step, restored.damaged) == (1, ("step-00000002",)), what
        assert same(values(fresh), values(run))
        file.write_bytes(kept[file])
    manifest.write_bytes(b"")
    (tmp_path / "step-00000001" / "checkpoint.json").unlink()
    fresh, untouched = run_of(1), run_of(1)
    restored = store.restore(fresh)
    assert restored is not None and (restored.step, len(restored.damaged)) == (0, 2)
    assert same(values(fresh), values(untouched)), "where nothing is whole, nothing is touched"


def test_the_files_are_safetensors_and_json_and_nothing_else(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {str(dtype): torch.arange(5).to(dtype) for dtype in FORMATS}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "turned": torch.arange(6.0).reshape(2, 3).t()}
    store = Checkpoints(tmp_path)
    store.save(1, RunState(tensors, []), {"best": float("inf")})
    store.writer.wait()
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "shard-00000.safetensors"]
    read = load_file(folder / "shard-00000.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].float(), tensor.float()), name
    manifest = json.loads((folder / "checkpoint.json").read_text())
    data = (folder / "shard-00000.safetensors").read_bytes()
    assert manifest["sha256"] == {"shard-00000.safetensors": hashlib.sha256(data).hexdigest()}
    again = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    restored = store.restore(RunState(again, []))
    assert restored is not None and restored.state == {"best": float("inf")}
    assert all(torch.equal(again[name].float(), tensors[name].float()) for name in tensors)


def test_state_that_was_not_there_yet_is_not_there_afterwards(tmp_path: Path) -> None:
    """A part that had not joined the training when the checkpoint was written begins with its first step, then too."""
    run, store = run_of(), Checkpoints(tmp_path)
    optimizer = run.optimizers[0]
    del optimizer.state[run.parameters["1.bias"]]
    store.save(1, run, {})
    store.writer.wait()
    for fresh in (run_of(1), RunState(run_of(1).parameters, [])):
        if not fresh.optimizers:
            fresh = RunState(fresh.parameters, [torch.optim.AdamW(fresh.parameters.values(), lr=0.1)])
        assert store.restore(fresh) is not None
        assert same(values(fresh), values(run))
        assert fresh.optimizers[0].param_groups[0]["lr"] == 0.1
        assert all(state for p, state in fresh.optimizers[0].state.items() if p is not fresh.parameters["1.bias"])


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, run_of(), {})
    store.writer.wait()
    other = RunState({"0.weight": torch.zeros(7, 5)}, [])
    with pytest.raises(FledgeError, match="another model"):
        store.restore(other)
    assert not other.parameters["0.weight"].any()


# --- which are kept --------------------------------------------------------------------------------------------------


def test_the_last_few_are_kept_and_the_last_two_anchors(tmp_path: Path) -> None:
    run, store = run_of(), Checkpoints(tmp_path, keep_last=3)
    for step in range(1, 12):
        store.save(step, run, {}, anchor_every=4)
    store.writer.wait()
    assert store.steps() == [11, 10, 9, 8, 4]
    store.forget_after(9)
    assert store.steps() == [9, 8, 4]


def test_the_best_weights_stay_as_long_as_a_checkpoint_means_them(tmp_path: Path, events: Emitter) -> None:
    run, store = run_of(), Checkpoints(tmp_path, keep_last=2)
    for step, best in ((2, 2), (4, 2), (6, 6), (8, 6), (10, 6)):
        if best == step:
            store.save_best(step, run)
        store.save(step, run, {"best_step": best})
        store.writer.wait()
        found = sorted(path.name for path in tmp_path.glob("best-*"))
        assert found == {6: ["best-00000002", "best-00000006"], 8: ["best-00000006"], 10: ["best-00000006"]}.get(
            step, ["best-00000002"]
        )
    fresh = run_of(1)
    assert store.restore_best(6, fresh) and not store.restore_best(2, fresh)
    assert same(fresh.weights(), run.weights())


# --- where -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a real server; `s3://` leads to it through the usual variables."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("checkpoints")
    yield "s3://checkpoints/runs/abc"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_a_run_goes_on_from_an_object_store(
    kind: str, tmp_path: Path, events: Emitter, heard: list[Event], request: pytest.FixtureRequest
) -> None:
    where = {"memory": "memory://runs/abc", "file": f"file://{tmp_path}/a%20b"}.get(kind) or request.getfixturevalue(
        "s3"
    )
    options: dict[str, Any] = {"steps": 7, "checkpoint_every": 2, "folder": where}
    with pytest.raises(Killed):
        trainer(with_dropout(tiny()), events, source=KillingSource(5), **options).fit()
    store = Checkpoints(where)
    assert store.steps() == [4, 2]
    data = b"".join(bytes(piece) for piece in store.place.read("step-00000004", "shard-00000.safetensors", [(0, 900)]))
    assert data.startswith(int.to_bytes(int.from_bytes(data[:8], "little"), 8, "little")) and len(data) == 900
    resumed, whole = with_dropout(tiny()), with_dropout(tiny())
    trainer(resumed, events, **options).fit()
    trainer(whole, events, steps=7).fit()
    assert weights(resumed) == weights(whole)
    if kind == "file":
        (folder,) = (tmp_path / "a b").glob("step-00000006")
        assert (folder / "checkpoint.json").is_file()
        return
    system, root = store.place.system, store.place.root  # type: ignore[attr-defined]
    shard = f"{root}/step-00000006/shard-00000.safetensors"
    content = bytearray(system.cat_file(shard))
    content[-1] ^= 1
    system.pipe_file(shard, bytes(content))
    fresh = Checkpoints(where).restore(trainer_state())
    assert fresh is not None and (fresh.step, fresh.damaged) == (4, ("step-00000006",))
    system.rm(f"{root}/step-00000004/checkpoint.json")
    gone = Checkpoints(where).restore(trainer_state())
    assert gone is not None and gone.step == 0, "without its manifest it does not exist"


def trainer_state() -> RunState:
    model = tiny()
    parameters = {f"model.{name}": p for name, p in model.named_parameters()}
    return RunState(parameters, [torch.optim.AdamW(parameters.values(), fused=True)])


def test_where_an_execution_key_says(tmp_path: Path) -> None:
    def job(**execution: Any) -> Job:
        work = tmp_path / "work" / "0123abcd"
        return Job("base", work / "out", work, 1, Execution(**execution), Emitter("base", 0, lambda event: None))

    assert job().checkpoints == tmp_path / "work" / "0123abcd" / "checkpoints"
    assert job(checkpoints="s3://bucket/runs/").checkpoints == "s3://bucket/runs/0123abcd"
    inside = replace(job(checkpoints="s3://bucket"), work=tmp_path / "work" / "0123abcd" / "runs" / "small")
    assert inside.checkpoints == "s3://bucket/0123abcd/runs/small"
    assert place_of(job(checkpoints=str(tmp_path / "fast")).checkpoints).path == tmp_path / "fast" / "0123abcd"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="cannot be written to"):
        Execution(checkpoints="https://example.com/x")
    with pytest.raises(FledgeError, match="no such kind of URL"):
        place_of("nosuch://bucket")


# --- told to stop ----------------------------------------------------------------------------------------------------


def test_a_long_step_is_left_in_the_middle(tmp_path: Path, events: Emitter) -> None:
    """Between two micro-batches: nothing of the step is kept, and the checkpoint is that of the step before."""

    class Told(Packed):
        def batch(self, step: int) -> Any:
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step)

    model, options = with_dropout(tiny()), {"steps": 7, "micro_batch": 2}
    with pytest.raises(SystemExit) as left:
        trainer(model, events, source=Told(), folder=tmp_path, **options).fit()
    assert left.value.code == 143 and Checkpoints(tmp_path).steps()[0] == 4
    resumed, whole = with_dropout(tiny()), with_dropout(tiny())
    trainer(resumed, events, folder=tmp_path, **options).fit()
    trainer(whole, events, **options).fit()
    assert weights(resumed) == weights(whole)
    with pytest.raises(SystemExit):
        trainer(tiny(), events, source=Told(), **options).fit()


# --- killed ----------------------------------------------------------------------------------------------------------

KILLS = """
import os, random, signal, sys, threading
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from fledge.core.events import Emitter
from tests.training.test_checkpoints import killable, digest
from tests.training.toys import tiny
tiny()  # imports what a child would otherwise import
kills, folder, steps, seed = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rng, done, died = random.Random(seed), 0, True
while died:
    # a fork of this process, which has trained nothing yet: it need not import everything again
    left, delay = rng.randint(0, steps // (2 * kills)), rng.random() * 0.005
    child = os.fork()
    if not child:
        def die():
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        def say(event):
            global left
            left -= event.kind == "progress"
            if done < kills and event.kind == "progress" and left == 0:
                die()
            elif done < kills and left < -3:  # the timer is late: the machine is busy
                os.kill(os.getpid(), signal.SIGKILL)
        if done < kills and left == 0:
            die()
        model = killable(steps, Emitter("x", 0, say), folder)
        (folder.parent / "digest").write_text(digest(model))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    died = status != 0
    done += died
print(done, (folder.parent / "digest").read_text())
"""


def killable(steps: int, events: Emitter, folder: Path | None) -> Any:
    """A run with dropout, held-out measurements and a checkpoint after every second step."""
    model = with_dropout(tiny())
    options: dict[str, Any] = {"evaluate_every": 5, "patience": 50, "optimizer": "muon", "dtype": "bfloat16"}
    run = trainer(model, events, steps, folder=folder, checkpoint_every=2, **options)
    run.held_out_loss = lambda: float(sum(p.detach().abs().sum() for p in model.parameters()))
    run.fit()
    return model


def digest(model: Any) -> str:
    return hashlib.sha256(b"".join(data for _, data in sorted(weights(model).items()))).hexdigest()


def killed(kills: int, folder: Path, steps: int, seed: int) -> tuple[int, str]:
    """How many kills hit the run, and the digest of its weights in the end."""
    folder.mkdir()
    code = KILLS.format(root=str(ROOT))
    arguments = [str(kills), str(folder / "checkpoints"), str(steps), str(seed)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    count, found = done.stdout.split()
    return int(count), found


def test_three_kills_and_the_same_weights(tmp_path: Path, events: Emitter) -> None:
    count, found = killed(3, tmp_path / "killed", 40, 1)
    assert count == 3
    assert found == digest(killable(40, events, None))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(3))
def test_twenty_kills_and_the_same_weights(tmp_path: Path, events: Emitter, seed: int) -> None:
    count, found = killed(20, tmp_path / "killed", 600, seed)
    assert count == 20
    assert found == digest(killable(600, events, None))
