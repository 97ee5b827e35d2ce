"""Work divided among processes: every result once, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fledge.core.errors import FledgeError, Problem
from fledge.core.machine import cores
from fledge.core.stage import Execution
from fledge.core.workers import spread, workers_for

TWO = Execution(workers=2)


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def dies_once(mark: Path) -> str:
    """Ends its process as the system would for want of memory, the first time it is asked."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.name


def always_dies(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuses(number: int) -> int:
    if number == 3:
        raise FledgeError(Problem("the third is bad", where="3"))
    return number


def test_every_item_gives_one_result_in_other_processes() -> None:
    results = list(spread(square, range(20), TWO))
    assert sorted(value for value, _ in results) == [n * n for n in range(20)]
    pids = {pid for _, pid in results}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2


def test_one_worker_or_one_item_stays_in_this_process() -> None:
    assert {pid for _, pid in spread(square, range(3), Execution(workers=1))} == {os.getpid()}
    assert {pid for _, pid in spread(square, [5], TWO)} == {os.getpid()}
    assert list(spread(square, [], TWO)) == []


def test_as_many_workers_as_asked_for_but_no_more_than_pieces() -> None:
    assert workers_for(Execution(workers=8), 3) == 3
    assert workers_for(Execution(workers=0), 1000) == cores()


def test_what_a_dead_worker_had_is_tried_again(tmp_path: Path) -> None:
    marks = [tmp_path / str(n) for n in range(3)]
    marks[1].touch(), marks[2].touch()
    assert sorted(spread(dies_once, marks, TWO)) == ["0", "1", "2"]


def test_a_piece_that_always_dies_ends_it_with_a_message() -> None:
    with pytest.raises(FledgeError, match="worker processes ended before their work was done, 3 times"):
        list(spread(always_dies, [1, 2], TWO))


def test_an_error_of_the_work_comes_back_as_it_is() -> None:
    with pytest.raises(FledgeError) as caught:
        list(spread(refuses, range(6), TWO))
    assert caught.value.problems == (Problem("the third is bad", where="3"),)


def test_workers_end_with_their_parent_even_if_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from tests.core.test_workers import *\n"
        "if __name__ == '__main__':\n"
        f"    list(spread(beats, [Path({str(tmp_path / 'a')!r}), Path({str(tmp_path / 'b')!r})], TWO))\n"
    )
    script = tmp_path / "main.py"
    script.write_text(code, encoding="utf-8")
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(root)})
    beat = [tmp_path / "a", tmp_path / "b"]
    _until(lambda: all(file.exists() for file in beat))
    parent.kill()
    parent.wait()
    pids = [int(file.read_text()) for file in beat]
    _until(lambda: not any(_alive(pid) for pid in pids))


def beats(file: Path) -> None:
    """Says who it is, then works for a minute."""
    making = file.with_suffix(".tmp")
    making.write_text(str(os.getpid()))
    making.replace(file)
    time.sleep(60)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _until(holds: object, seconds: float = 30) -> None:
    assert callable(holds)
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
