"""Sweeps through the recipe machinery: the optimum is found, nothing is tried twice, the hopeless is stopped."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fledge.cli.main import cli
from fledge.core import stage as stages
from fledge.core.errors import FledgeError
from fledge.core.events import Event
from fledge.core.store import Store
from fledge.training.search.pruning import Hopeless, Watch
from fledge.training.search.samplers import Bayes, Grid, Random
from fledge.training.search.space import Choice, Range, parse
from fledge.training.search.sweep import Goal, Sweep
from fledge.training.search.trial import Trial

RECIPE = """\
name: toy
stages:
  ready: {use: toy.prepare}
  bowl: {use: toy.bowl, data: ready}
  other: {use: toy.prepare, seed: 9}
"""
SPACE = [parse("bowl.train.lr=1e-5..1:log"), parse("bowl.train.batch_size=4,8,16,32")]


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEDGE_STAGES", "sweep_toys")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("TOY_NOTES", str(tmp_path / "notes"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    stages.all_stages.cache_clear()


def sweep(trials: int = 4, **more: Any) -> Sweep:
    given = {"space": SPACE, "goal": Goal("bowl", "floor"), "store": Store(), **more}
    return Sweep(file=Path("r.yaml"), trials=trials, **given)


def notes() -> list[str]:
    file = Path(os.environ["TOY_NOTES"])
    return file.read_text().splitlines() if file.exists() else []


def bowl(values: dict[str, Any]) -> float:
    lr, batch = float(values["bowl.train.lr"]), float(values["bowl.train.batch_size"])
    return (math.log10(lr) + 2.52) ** 2 + (math.log2(batch) - 4) ** 2


def played(sampler: Any, count: int) -> list[Trial]:
    """A sweep in one's head."""
    trials: list[Trial] = []
    while len(trials) < count and (values := sampler.suggest(trials)) is not None:
        trials.append(Trial(len(trials), values, "complete", bowl(values)))
    return trials


def test_a_space_is_read_as_it_is_written() -> None:
    assert [
        Range("bowl.train.lr", 1e-5, 1.0, log=True),
        Choice("bowl.train.batch_size", ("4", "8", "16", "32")),
    ] == SPACE
    assert parse("a.lora.rank=4..64:log") == Range("a.lora.rank", 4, 64, True, True)
    assert parse("a.tokens=1M..8M:4").grid() == [1_000_000, 3_333_333, 5_666_667, 8_000_000]
    assert parse("a.lr=1e-4..1e-2:log:3").grid() == [1e-4, 1e-3, 1e-2]
    assert parse("a.epochs=1..4").grid() == [1, 2, 3, 4] and parse("a.x=0.1..0.5").at(0.5) == 0.3
    whole = parse("a.epochs=1..4")
    assert [whole.at(i / 8) for i in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4] or {whole.at(i / 99) for i in range(99)} == {
        1,
        2,
        3,
        4,
    }
    for wrong in ("lr=1..2", "a.lr", "a.lr=", "a.lr=3", "a.lr=2..1", "a.lr=0..1:log", "a.lr=a..b"):
        with pytest.raises(FledgeError):
            parse(wrong)
    with pytest.raises(FledgeError, match="how many points"):
        parse("a.lr=1e-4..1e-2:log").grid()


def test_the_same_seed_tries_the_same_and_nothing_twice() -> None:
    for make in (lambda seed: Random(SPACE, seed), lambda seed: Bayes(SPACE, seed, False, 4)):
        one, two, other = (played(make(seed), 12) for seed in (0, 0, 1))
        assert one == two != other
        assert len({str(trial.values) for trial in one}) == 12
    few = [parse("a.x=1,2"), parse("a.y=1,2")]
    assert len(Grid(few).all) == 4 and Grid(few).suggest([Trial(i, {}, "complete", 0.0) for i in range(4)]) is None
    trials: list[Trial] = []
    while (values := Random(few, 3).suggest(trials)) is not None:
        trials.append(Trial(len(trials), values, "complete", 0.0))
    assert len(trials) == 4, "all of a small space, then nothing"


def test_bayes_comes_nearer_than_chance() -> None:
    found = {"bayes": 0.0, "random": 0.0}
    for seed in range(5):
        found["bayes"] += min(t.value for t in played(Bayes(SPACE, seed, False, 6), 25) if t.value is not None)
        found["random"] += min(t.value for t in played(Random(SPACE, seed), 25) if t.value is not None)
    assert found["bayes"] / 5 < 0.15 and found["bayes"] < found["random"]
    told = played(Bayes(SPACE, 0, False, 6), 10)
    told[7:] = [
        Trial(7, told[7].values, "pruned", rungs={0.25: 9.0}),
        Trial(8, told[8].values, "failed", reason="x"),
        told[9],
    ]
    assert Bayes(SPACE, 0, False, 6).suggest(told)


def test_a_sweep_finds_the_known_optimum_and_makes_what_is_shared_once() -> None:
    grid = sweep(
        20, space=[parse("bowl.train.lr=3e-3..3e-2:log:2"), parse("bowl.train.batch_size=8,16")], method="grid"
    )
    heard: list[Trial] = []
    trials = grid.run(heard.append)
    assert trials == heard and [t.state for t in trials] == ["complete"] * 4
    best = grid.best(trials)
    assert best is not None and best.values == {"bowl.train.lr": 0.003, "bowl.train.batch_size": "16"}
    assert best.value == pytest.approx((math.log10(0.003) + 2.52) ** 2)
    assert notes().count("prepare") == 1, "one stage for all trials, and none that the goal does not need"
    table = list(csv.reader((grid.folder / "sweep.csv").open(encoding="utf-8")))
    assert len(table) == 5 and table[0][:4] == ["trial", "bowl.train.lr", "bowl.train.batch_size", "bowl.floor"]
    assert json.loads((grid.folder / "study.json").read_text())["best"]["number"] == best.number
    assert b"<svg" in (grid.folder / "study.svg").read_bytes()

    again = sweep(20, space=grid.space, method="grid", goal=Goal("bowl", "deep.negative", maximize=True))
    before = len(notes())
    assert again.name != grid.name and again.best(again.run()).values == best.values  # type: ignore[union-attr]
    assert len(notes()) == before, "another goal, but every stage is there"


def test_a_killed_sweep_goes_on_without_repeating_a_trial(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests.training.test_sweep import *\n"
        "sweep(4, settings=['bowl.pause=0.05']).run()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{os.environ['PYTHONPATH']}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while sum(line.startswith("begin") for line in notes()) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = notes()
    assert sum(line.startswith("end") for line in killed) == 2, "two trials were over, the third was under way"
    whole = sweep(4, settings=["bowl.pause=0.05"])
    trials = whole.run()
    begun = [line.rpartition(" at ")[0] for line in notes() if line.startswith("begin")]
    assert len(trials) == 4 and len(set(begun)) == 4 and len(begun) == 5
    resumed = next(line for line in notes()[len(killed) :] if line.startswith("begin"))
    assert int(resumed.rpartition(" ")[2]) > 0, "the third went on from its checkpoint"
    assert [t.values for t in trials] == [t.values for t in played(Random(SPACE, 0), 4)]
    more = sweep(5, settings=["bowl.pause=0.05"])
    assert more.folder == whole.folder and more.run()[:4] == trials, "more trials of the same sweep"


def test_the_hopeless_is_stopped_on_its_way_and_the_failed_is_told() -> None:
    rates = "0.003,0.002,0.004,0.0025,1e-5,2"
    space = [parse(f"bowl.train.lr={rates}")]
    stopped = sweep(
        6, space=space, method="grid", stop="median", settings=["bowl.pause=0.06", "bowl.train.batch_size=16"]
    )
    trials = stopped.run()
    assert [t.state for t in trials] == ["complete"] * 4 + ["pruned", "failed"]
    assert "far too high" in trials[5].reason
    assert max(trials[4].rungs) < 0.75 and "end 1e-05 16" not in notes()
    assert not [f for f in stopped.store.work.iterdir() if f.is_dir() and (f / "state.json").exists()
                and json.loads((f / "state.json").read_text()) < 20 and "1e-05" in str(f)]  # fmt: skip
    assert stopped.best(trials).values["bowl.train.lr"] == "0.003"  # type: ignore[union-attr]
    assert trials[0].rungs.keys() == {0.25, 0.375, 0.5, 0.625, 0.75}
    # on a rung: the mean of 5 / step over the steps since half of it, above the floor
    mean = sum(5 / step for step in (3, 4, 5)) / 3
    assert trials[0].rungs[0.25] == pytest.approx(trials[0].value + mean)


def test_asha_keeps_the_best_third() -> None:
    earlier = [Trial(i, {}, "complete", 0.0, {1 / 9: float(i), 1 / 3: float(i)}) for i in range(5)]
    for loss, survives in ((0.5, True), (1.5, False)):
        watch = Watch("s", "loss", False, "asha", earlier)
        watch.hear(Event("progress", "s", name="steps", value=1, data={"total": 9}))
        events = [Event("metric", "s", name="loss", value=loss, step=step) for step in range(1, 10)]
        if survives:
            for event in events:
                watch.hear(event)
        else:
            with pytest.raises(Hopeless):
                watch.hear(events[0])
            watch.hear(events[1])  # said once
        assert watch.hopeless is not survives
    upwards = Watch("s", "accuracy", True, "median", [Trial(i, {}, "complete", 0.0, {0.25: 0.9}) for i in range(4)])
    upwards.hear(Event("progress", "s", name="steps", value=1, data={"total": 4}))
    with pytest.raises(Hopeless):
        upwards.hear(Event("metric", "s", name="accuracy", value=0.5, step=1))


def test_what_a_sweep_cannot_be_is_said_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "no stage": {"space": [parse("base.train.lr=1,2")]},
        "unknown key": {"space": [parse("bowl.train.rate=1,2")]},
        "greater than": {"space": [parse("bowl.train.lr=-1..1")]},
        "does not depend": {"space": [parse("other.seed=1,2")]},
    }
    for words, given in wrong.items():
        with pytest.raises(FledgeError, match=words):
            sweep(**given).run()  # type: ignore[arg-type]
    with pytest.raises(FledgeError, match="a goal is"):
        Goal.parse("bits_per_byte")
    assert notes() == []
    with pytest.raises(FledgeError, match="no metric flor"):
        sweep(goal=Goal("bowl", "flor")).run()
    monkeypatch.setattr("fledge.training.search.sweep.GIVE_UP", 1)
    with pytest.raises(FledgeError, match="first trials all failed"):
        sweep(settings=["bowl.fail_above=0.000001"]).run()


def test_the_command_tells_every_trial_and_the_best_as_a_recipe_takes_it() -> None:
    command = ["sweep", "r.yaml", "--vary", "bowl.train.lr=0.003,0.03", "--method", "grid", "--trials", "9"]
    runner = CliRunner()
    done = runner.invoke(cli, [*command, "--maximize", "bowl.deep.negative", "--stop-early"], catch_exceptions=False)
    told = [line.split() for line in done.output.splitlines()]
    assert told[0][:5] == ["trial", "1", "of", "9", "lr=0.003"] and told[1][:5] == ["trial", "2", "of", "9", "lr=0.03"]
    assert "fledge run r.yaml --set bowl.train.lr=0.003" in done.output
    again = runner.invoke(cli, [*command, "--maximize", "bowl.deep.negative", "--stop-early"], catch_exceptions=False)
    assert again.output.splitlines()[2:] == done.output.splitlines()[2:] and len(notes()) == 5, "nothing is made again"
    for given, words in (([], "one goal"), (["--minimize", "a.b", "--maximize", "a.b"], "one goal")):
        with pytest.raises(FledgeError, match=words):
            runner.invoke(cli, [*command, *given], catch_exceptions=False)
