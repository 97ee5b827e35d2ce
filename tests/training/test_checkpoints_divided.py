"""Checkpoints of runs that are divided among processes: four of them, started once, go through every case.

Written by four with FSDP2, read by four, two, one, by tensor parallelism and by both; one process that fails, one file
that is damaged, one process that is told to stop.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fledge.training.checkpoints.state import RunState
from fledge.training.checkpoints.store import Checkpoints, Groups

WORLD = 4
ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """An embedding, two matrices that tensor parallelism can divide, and an output that nothing divides evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.down(torch.tanh(self.up(self.embed(ids)))))


class Run:
    """A small training whose state a checkpoint holds."""

    def __init__(self, divide: Callable[[nn.Module], Any] | None = None, share: tuple[int, int] = (0, 1)) -> None:
        self.net, self.share = Net(), share
        if divide is not None:
            divide(self.net)
        self.parameters = {f"model.{name}": p for name, p in self.net.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-2, weight_decay=0.1)
        self.state = RunState(self.parameters, [self.optimizer])

    def steps(self, first: int, last: int) -> None:
        part, parts = self.share
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            ids, labels = (
                torch.randint(0, 11, (8,), generator=generator),
                torch.randint(0, 3, (8,), generator=generator),
            )
            rows = slice(8 * part // parts, 8 * (part + 1) // parts)
            nn.functional.cross_entropy(self.net(ids[rows]), labels[rows]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def whole(self) -> dict[str, Tensor]:
        """Every tensor of the run, put together again."""
        found = self.state.tensors()
        return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in found.items()}

    def own(self) -> dict[str, bytes]:
        """The bytes that this process holds."""
        found = self.state.tensors()
        return {n: (t.to_local() if hasattr(t, "to_local") else t).numpy().tobytes() for n, t in found.items()}


def mesh(*sizes: int) -> Any:
    names = ("outer", "inner")[-len(sizes) :]
    return dist.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def sharded(over: Any) -> Callable[[nn.Module], Any]:
    return lambda net: dist.fsdp.fully_shard(net, mesh=over)


def tensor_parallel(over: Any) -> Callable[[nn.Module], Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return lambda net: parallelize_module(net, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def near(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


def groups() -> Groups:
    return Groups(dist.get_rank(), WORLD)


def written(folder: Path, make: Callable[[], Run], steps: int = 3) -> Run:
    """A run of so many steps with a checkpoint after each."""
    run, store = make(), Checkpoints(folder, groups(), keep_last=9)
    for step in range(steps):
        run.steps(step, step + 1)
        store.save(step + 1, run.state, {"losses": [step / 3]})
        store.writer.settle()
    store.writer.wait()
    return run


def by_four() -> Run:
    return Run(sharded(mesh(WORLD)), (dist.get_rank(), WORLD))


# --- the cases: each is run by all four processes ------------------------------------------------------------------


def case_the_same_division_goes_on_bit_for_bit(folder: Path) -> None:
    run = written(folder, by_four)
    run.steps(3, 5)
    again = by_four()
    restored = Checkpoints(folder, groups()).restore(again.state)
    assert restored is not None and (restored.step, restored.state) == (3, {"losses": [2 / 3]})
    again.steps(3, 5)
    assert again.own() == run.own()
    files = sorted(path.name for path in (folder / "step-00000003").iterdir())
    assert files == ["checkpoint.json", *(f"shard-{rank:05d}.safetensors" for rank in range(WORLD))]


def case_other_divisions_read_the_same_numbers_and_go_on(folder: Path) -> None:
    from safetensors.torch import load_file

    run = written(folder, by_four)
    saved = run.whole()
    run.steps(3, 5)
    later = run.whole()
    rank = dist.get_rank()
    pairs, grid = mesh(2, 2), mesh(2, 2)

    def both(net: nn.Module) -> None:
        tensor_parallel(grid["inner"])(net)
        sharded(grid["outer"])(net)

    divisions = {
        "two": (lambda: Run(sharded(pairs["inner"]), (rank % 2, 2)), groups()),
        "tensor": (lambda: Run(tensor_parallel(mesh(WORLD))), groups()),
        "both": (lambda: Run(both, (rank // 2, 2)), groups()),
        "hybrid": (lambda: Run(sharded(pairs), (rank, WORLD)), groups()),
        "one": (Run, Groups()),
    }
    for name, (make, speaking) in divisions.items():
        other = make()
        other.steps(7, 8)  # something else is there before
        restored = Checkpoints(folder, speaking).restore(other.state)
        assert restored is not None and restored.step == 3, name
        same(other.whole(), saved)
        other.steps(3, 5)
        near(other.whole(), later)
    plain = load_file(folder / "step-00000003" / "shard-00000.safetensors")
    assert "model.embed.weight" in plain and plain["model.embed.weight"].shape == (3, 16)


def case_and_back_again(folder: Path) -> None:
    """Two by two, tensor parallel and sharded (every matrix in four unlike pieces), read by one and by four."""
    grid = mesh(2, 2)

    def both(net: nn.Module) -> None:
        tensor_parallel(grid["inner"])(net)
        sharded(grid["outer"])(net)

    saved = written(folder, lambda: Run(both, (dist.get_rank() // 2, 2))).whole()
    one = Run()
    assert Checkpoints(folder).restore(one.state) is not None
    same(one.whole(), saved)
    four = by_four()
    assert Checkpoints(folder, groups()).restore(four.state) is not None
    same(four.whole(), saved)


def case_copies_share_the_writing(folder: Path) -> None:
    run = written(folder, Run, 1)
    sizes = [path.stat().st_size for path in (folder / "step-00000001").glob("*.safetensors")]
    assert len(sizes) == WORLD and max(sizes) < 0.6 * sum(sizes)
    other = Run()
    assert Checkpoints(folder, groups()).restore(other.state) is not None
    same(other.whole(), run.whole())


def case_one_that_cannot_write_stops_all_and_nothing_older_is_lost(folder: Path) -> None:
    run, store = by_four(), Checkpoints(folder, groups())
    run.steps(0, 1)
    store.save(1, run.state, {})
    store.writer.wait()
    if dist.get_rank() == 2:

        def full(name: str, file: str) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        store.place.create = full  # type: ignore[method-assign]
    store.save(2, run.state, {})
    with pytest.raises(OSError, match="No space left"):
        store.writer.wait()
    dist.barrier()
    assert Checkpoints(folder).steps() == [1]
    other = by_four()
    restored = Checkpoints(folder, groups()).restore(other.state)
    assert restored is not None and restored.step == 1 and not restored.damaged
    same(other.whole(), run.whole())


def case_a_damaged_shard_is_noticed_by_all(folder: Path) -> None:
    written(folder, by_four)
    if dist.get_rank() == 0:
        file = folder / "step-00000003" / "shard-00003.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        (folder / "step-00000002" / "shard-00001.safetensors").unlink()
    dist.barrier()
    other, expected = by_four(), by_four()
    restored = Checkpoints(folder, groups()).restore(other.state)
    assert restored is not None and (restored.step, restored.damaged) == (1, ("step-00000003", "step-00000002"))
    expected.steps(0, 1)
    assert other.own() == expected.own()


def case_one_is_told_to_stop_and_all_leave_at_the_same_step(folder: Path) -> None:
    from fledge.core.events import Emitter
    from fledge.training.layout.ranks import Ranks
    from tests.training.test_trainer import trainer, weights
    from tests.training.toys import Packed, tiny

    class Stopping(Packed):
        """Tells this process to stop when its fourth batch is asked for."""

        def batch(self, step: int) -> Any:
            if step == 3 and dist.get_rank() == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step)

    def fit(source: Packed, where: Path | None) -> Any:
        model = tiny()
        run = trainer(model, Emitter("x", 0, lambda event: None), steps=7, source=source, folder=where)
        run.ranks = Ranks.join(dist.get_rank(), WORLD)
        run.fit()
        return weights(model)

    with pytest.raises(SystemExit) as left:
        fit(Stopping(8), folder)
    assert left.value.code == 143
    manifest = json.loads((folder / "step-00000004" / "checkpoint.json").read_text())
    assert manifest["processes"] == WORLD and manifest["step"] == 4, "all of them after the step in hand"
    assert Checkpoints(folder).steps()[0] == 4
    assert fit(Packed(8), folder) == fit(Packed(8), None)


def case_a_training_goes_on_under_every_other_layout(folder: Path) -> None:
    """Four steps sharded by four, then the rest sharded again (to the bit), by pieces of matrices, or in a pipeline."""
    import shutil

    from fledge.core.events import Emitter, Event
    from fledge.core.stage import Layout
    from fledge.training.layout.ranks import Ranks
    from tests.training.test_trainer import Killed, KillingSource, trainer
    from tests.training.toys import Packed, tiny

    class Dies(KillingSource):
        """Eight rows a batch."""

        def __init__(self, at: int) -> None:
            super().__init__(at)
            self.rows = 8

    heard: list[Event] = []

    def fit(source: Packed, where: Path | None, layout: Layout | None = None) -> dict[str, Tensor]:
        model = tiny()
        run = trainer(model, Emitter("x", 0, heard.append), 7, source, where, checkpoint_every=2, lr=1e-2)
        if layout is not None:
            run.ranks = Ranks.join(dist.get_rank(), WORLD, layout=layout)
        run.fit()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    four = Layout(shard=4)
    with pytest.raises(Killed):
        fit(Dies(5), folder / "killed", four)
    whole = fit(Packed(8), None, four)
    near(fit(Packed(8), None), whole)
    for name, layout in {
        "again": four,
        "hybrid": Layout(shard=2, replicate=2),
        "tensor": Layout(tensor=2, shard=2),
        "pipeline": Layout(pipeline=2),
        "copies": Layout(),
    }.items():
        if dist.get_rank() == 0:
            shutil.copytree(folder / "killed", folder / name)
        dist.barrier()
        heard.clear()
        found = fit(Packed(8), folder / name, layout)
        assert [e.value for e in heard if e.kind == "message" and "going on" in str(e.value)] == [
            "going on after step 4"
        ], name
        (same if name == "again" else near)(found, whole)


CASES = [name for name in dir() if name.startswith("case_")]


def work(folder: Path) -> None:
    """One of the four processes: every case, and how it ended."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for name in CASES:
        try:
            globals()[name](folder / name)
            found = ""
        except BaseException:
            found = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(found)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """How each case ended in each process: with nothing to say, or with a traceback."""
    folder = tmp_path_factory.mktemp("divided")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path;"
        f"from tests.training.test_checkpoints_divided import work; work(Path({str(folder)!r}))"
    )
    port = str(20_000 + os.getpid() % 20_000)
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(WORLD)}
    common["OMP_NUM_THREADS"] = "1"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env={**common, "RANK": str(rank)}) for rank in range(WORLD)
    ]
    try:
        codes = [process.wait(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    files = {name: [folder / f"{name}.{rank}" for rank in range(WORLD)] for name in CASES}
    said = {n: [f.read_text() if f.exists() else f"never ended {codes}" for f in fs] for n, fs in files.items()}
    return said


@pytest.mark.parametrize("case", CASES)
def test_four_processes(ended: dict[str, list[str]], case: str) -> None:
    assert ended[case] == [""] * WORLD, "\n".join(ended[case])
