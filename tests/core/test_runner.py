"""The runner with real child processes: caching, why something is stale, failures, kills, two runners on one store."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fledge.core.artifact import EVENTS, MANIFEST
from fledge.core.errors import Interrupted, StageFailed
from fledge.core.events import Event, curve, read_events
from fledge.core.plan import make_plan
from fledge.core.recipe import Recipe, load
from fledge.core.runner import Runner
from fledge.core.store import Store, garbage, verify

RECIPE = """\
name: toy
seed: 3
stages:
  words: {use: toy.words, count: 12, sources: [extra.txt]}
  halves: {use: toy.halves, data: words}
  learn: {use: toy.learn, data: [halves.first, halves.second], train: {lr: 0.2}}
"""


def recipe(*settings: str) -> Recipe:
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    if not Path("extra.txt").exists():
        Path("extra.txt").write_text("from outside", encoding="utf-8")
    return load(Path("r.yaml"), settings)


def run(store: Store, *settings: str, listeners: list[object] | None = None, **how: str) -> dict[str, Path]:
    return Runner(make_plan(recipe(*settings), store, **how), store, listeners or []).run()  # type: ignore[arg-type]


def payloads(paths: dict[str, Path]) -> dict[str, str]:
    return {name: json.loads((path / MANIFEST).read_text())["payload"] for name, path in paths.items()}


def statuses(store: Store, *settings: str) -> dict[str, str]:
    return {step.name: step.status for step in make_plan(recipe(*settings), store).steps}


def test_what_is_there_is_not_made_again() -> None:
    store = Store()
    first = run(store)
    made = {path: (path / MANIFEST).stat().st_mtime_ns for path in first.values()}
    assert statuses(store) == {"words": "cached", "halves": "cached", "learn": "cached"}
    assert run(store) == first
    assert made == {path: (path / MANIFEST).stat().st_mtime_ns for path in first.values()}
    assert all(not verify(path) for path in first.values())
    assert (store.runs / "toy" / "learn").resolve() == first["learn"]


def test_the_plan_says_why() -> None:
    store = Store()
    run(store)
    why = {step.name: step.why for step in make_plan(recipe("learn.train.lr=0.3"), store).steps}
    assert why == {"words": (), "halves": (), "learn": ("train.lr: 0.2 → 0.3",)}
    Path("extra.txt").write_text("changed outside", encoding="utf-8")
    why = {step.name: step.why for step in make_plan(recipe(), store).steps}
    assert why["words"] == ("the input sources.0 changed",)
    assert why["halves"] == ("the input data changed",)


def test_names_and_places_do_not_count_but_bytes_seed_and_version_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from fledge.core.stage import stage_class

    store = Store()
    before = [step.fingerprint for step in make_plan(recipe(), store).steps]
    renamed = RECIPE.replace("words:", "letters:").replace("data: words", "data: letters")
    Path("r.yaml").write_text(renamed, encoding="utf-8")
    assert [step.fingerprint for step in make_plan(load(Path("r.yaml")), store).steps] == before
    threads = [
        step.fingerprint for step in make_plan(recipe("execution.threads=1", "words.execution.device=cpu"), store).steps
    ]
    assert threads == before
    assert make_plan(recipe("seed=4"), store).steps[0].fingerprint != before[0]
    monkeypatch.setattr(stage_class("toy.halves"), "version", 2)
    after = [step.fingerprint for step in make_plan(recipe(), store).steps]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_until_and_from() -> None:
    store = Store()
    assert set(run(store, until="halves")) == {"words", "halves"}
    first = run(store)
    again = make_plan(recipe(), store, start="halves")
    assert [step.status for step in again.steps] == ["cached", "make", "make"]
    assert payloads(Runner(again, store).run()) == payloads(first)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("error", ["words.txt:3: the words are wrong", "mend them"]),
        ("crash", ["RuntimeError: something broke inside", "log.txt"]),
        ("exit", ["stage learn failed"]),
    ],
)
def test_a_failing_stage_is_one_message_and_keeps_the_rest(how: str, expected: list[str]) -> None:
    store = Store()
    with pytest.raises(StageFailed) as caught:
        run(store, f"learn.fail={how}")
    for words in expected:
        assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert statuses(store)["halves"] == "cached"
    assert store.db.runs()[0].status == "failed"
    assert list(store.artifacts.glob("toy.learn-*")) == []


class KillAt:
    """A listener that kills the running child when it has heard `count` curve points."""

    def __init__(self, count: int) -> None:
        self.count, self.runner = count, None

    def hear(self, event: Event) -> None:
        if event.kind == "metric":
            self.count -= 1
            if self.count == 0 and self.runner is not None and self.runner.process is not None:
                os.kill(self.runner.process.pid, signal.SIGKILL)


def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes() -> None:
    whole = payloads(run(Store(Path("whole").absolute())))
    store = Store(Path("killed").absolute())
    rng = random.Random(0)
    kills = 0
    for _ in range(8):
        killer = KillAt(rng.randint(1, 4))
        runner = Runner(make_plan(recipe("words.pause=0.12"), store), store, [killer])
        killer.runner = runner
        try:
            paths = runner.run()
            break
        except StageFailed as error:
            assert "SIGKILL" in str(error)
            kills += 1
            assert statuses(store, "words.pause=0.12")["words"] == "resume"
    assert kills >= 2
    quick = {name: digest for name, digest in payloads(paths).items()}
    assert quick["words"] == whole["words"]
    losses = curve(read_events(paths["words"] / EVENTS), "words", "loss")
    assert list(losses) == list(range(1, 13))  # every step once, though several attempts told of it


def start_runner(*settings: str) -> subprocess.Popen[str]:
    """A runner in a process of its own, as a user starts it."""
    recipe()
    command = [sys.executable, "-m", "fledge.cli.main", "run", "r.yaml", *(f"--set={s}" for s in settings)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(found: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not found():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_when_the_runner_is_killed_no_child_goes_on_writing() -> None:
    store = Store()
    process = start_runner("words.pause=0.2", "words.count=200")
    states = lambda: list(store.work.glob("*/state.json"))  # noqa: E731
    wait_for(lambda: states() and len(json.loads(states()[0].read_text())) > 2)
    process.kill()
    process.wait()
    time.sleep(0.3)
    before = states()[0].read_text()
    time.sleep(0.8)
    assert states()[0].read_text() == before
    with store.lock(make_plan(recipe("words.pause=0.2", "words.count=200"), store).steps[0].fingerprint):
        pass  # nobody holds it any more
    paths = run(store, "words.pause=0", "words.count=12")
    assert set(paths) == {"words", "halves", "learn"}


def test_ctrl_c_loses_nothing_and_says_how_to_go_on() -> None:
    store = Store()
    process = start_runner("words.pause=0.2", "words.count=200")
    wait_for(lambda: list(store.work.glob("*/state.json")))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == Interrupted.exit_code
    assert "nothing is lost" in output and "fledge run r.yaml --set words.pause=0.2 --set words.count=200" in output
    assert "Traceback" not in output
    assert store.db.runs()[0].status == "interrupted"
    assert statuses(store, "words.pause=0.2", "words.count=200")["words"] == "resume"


def test_two_runners_on_one_store_do_not_collide() -> None:
    store = Store()
    heard: list[Event] = []

    class Hear:
        def hear(self, event: Event) -> None:
            heard.append(event)

    process = start_runner("words.pause=0.1")
    wait_for(lambda: list(store.work.glob("*/state.json")))
    # Both are planned before either runs: `recipe` writes the file that planning reads.
    here, beside = (
        Runner(make_plan(recipe("words.pause=0.1"), store), store, listeners) for listeners in ([Hear()], [])
    )
    other = threading.Thread(target=beside.run)
    other.start()
    paths = here.run()
    other.join()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert ("words", "waiting") in {(e.stage, e.name) for e in heard if e.kind == "stage"}
    assert ("words", "cached") in {(e.stage, e.name) for e in heard if e.kind == "stage"}
    assert len(list(store.artifacts.iterdir())) == 3
    assert all(not verify(path) for path in paths.values())


def test_verify_finds_what_was_changed_and_gc_what_nobody_needs() -> None:
    store = Store()
    first = run(store, "learn.train.lr=0.3")
    second = run(store)
    assert garbage(store) == [first["learn"]]
    config = second["learn"] / "config.json"
    assert not os.access(config, os.W_OK) or os.geteuid() == 0
    config.chmod(0o644)
    config.write_text("{}")
    (second["learn"] / "more.txt").write_text("")
    found = [str(problem) for problem in verify(second["learn"])]
    assert len(found) == 2 and "config.json" in found[0] and "was changed" in found[0] and "more.txt" in found[1]


def test_several_processes_are_started_by_torchrun() -> None:
    Path("d.yaml").write_text("name: d\nexecution: {processes: 2, threads: 1}\nstages: {where: {use: toy.where}}\n")
    store = Store()
    paths = Runner(make_plan(load(Path("d.yaml")), store), store).run()
    assert (paths["where"] / "words.txt").read_text() == "2 3.0"
