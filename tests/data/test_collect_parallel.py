"""Collecting in many processes, killed and gone on with; broken, missing and mixed files; a full disk."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fledge.data.collect as collecting
from fledge.core import disk
from fledge.core.errors import FledgeError, StageFailed
from fledge.core.plan import make_plan
from fledge.core.recipe import from_values
from fledge.core.runner import Runner as RecipeRunner
from fledge.core.store import Store
from fledge.data.stages import Collect
from fledge.records.rejects import read_rejects
from fledge.records.shards import read

from .conftest import Runner, digests, english


def jsonl(file: Path, count: int, seed: int = 0, bad: tuple[int, ...] = ()) -> list[str]:
    """Rows of text, those numbered in `bad` broken; the texts that are good."""
    rng = random.Random(seed)
    texts = [f"{i} {english(rng, 3)}" for i in range(count)]
    lines = [
        "{broken" if i in bad else json.dumps({"text": text, "id": f"{file.name}-{i}"}) for i, text in enumerate(texts)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [text for i, text in enumerate(texts) if i not in bad]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(collecting, "WORTH", 0)


def texts(path: Any) -> list[str]:
    return [record.text for record in read(path, "documents")]  # type: ignore[union-attr]


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, run: Runner, small_units: None) -> None:
    good = jsonl(tmp_path / "in/big.jsonl", 800, bad=(3, 500, 799))
    for number in range(30):
        good += jsonl(tmp_path / f"in/small{number:02d}.jsonl", 5, number)
    stage = Collect(kind="documents", sources=[str(tmp_path / "in")])
    one, two = run(stage, workers=1), run(stage, workers=2)
    assert texts(one) == good and digests(one.path) == digests(two.path) and one.metrics == two.metrics
    assert [row["where"] for row in read_rejects(one.path)] == ["big.jsonl:4", "big.jsonl:501", "big.jsonl:800"]
    units = sorted((run.home / "work1/collect").iterdir())
    assert len(units) > 8, "the big file was cut, and the small ones taken together"
    assert one.metrics["files"] == 31 and one.metrics["rows"] == len(good)
    assert one.metrics["bytes"] == sum(len(text.encode()) for text in good)
    assert run.events[-1].kind == "metric" and any(event.kind == "progress" for event in run.events)


def test_a_limit_does_not_depend_on_how_the_files_are_cut(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "a.jsonl", 500)
    stage = Collect(kind="documents", sources=[str(tmp_path / "a.jsonl")], limit=40)
    whole = texts(run(stage))
    monkeypatch.setattr(collecting, "UNIT_BYTES", 10_000)
    monkeypatch.setattr(collecting, "WORTH", 0)
    cut = run(stage, workers=2)
    assert texts(cut) == whole and len(whole) == 40 == cut.metrics["rows"]
    assert cut.metrics["bytes"] == sum(len(text.encode()) for text in whole)


KILLED = """
import os, sys
from pathlib import Path
import fledge.data.collect as collecting
from fledge.core.events import Emitter
from fledge.core.job import Job
from fledge.core.reference import resolve
from fledge.core.stage import Execution
from fledge.data.stages import Collect

source, home, survive = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
collecting.UNIT_BYTES = 20_000
make, made = collecting.make, []

def some(unit):
    if len(made) == survive:
        os._exit(9)  # in the middle of the work, without a word
    made.append(unit)
    return make(unit)

collecting.make = some
job = Job("test", home / "out", home / "work", 0, Execution(workers=1), Emitter("test", 0, lambda event: None), {},
          {source: resolve(source)})
Collect(kind="documents", sources=[source]).run(job)
"""


def test_a_collection_that_was_killed_goes_on_behind_its_finished_units(
    tmp_path: Path, run: Runner, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = jsonl(tmp_path / "in/a.jsonl", 600, bad=(7, 400))
    wanted = digests(run(Collect(kind="documents", sources=[str(tmp_path / "in")])).path)
    home = run.home / "killed"
    for survive in (3, 5):
        (home / "out").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(home), str(survive)]
        assert subprocess.run(command, check=False).returncode == 9
        assert not (home / "out/records").exists(), "nothing half-written"
        shutil.rmtree(home / "out")
    ready = {unit.name for unit in (home / "work/collect").iterdir() if not unit.name.startswith(".")}
    assert len(ready) == 5
    made: list[str] = []
    records = collecting._records
    monkeypatch.setattr(
        collecting, "_records", lambda unit, *rest: made.append(unit.folder.name) or records(unit, *rest)
    )
    again = run(Collect(kind="documents", sources=[str(tmp_path / "in")]), work="killed/work")
    assert texts(again) == good and digests(again.path) == wanted
    assert made and not ready & set(made), "what was there is not read again"


def test_broken_files_among_good_ones_are_counted_and_cost_nothing_else(tmp_path: Path, run: Runner) -> None:
    folder = tmp_path / "in"
    good = jsonl(folder / "a.jsonl", 10)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(os.urandom(4_000).hex().encode())[:-3_000])
    (folder / "c.jsonl").write_bytes(b"")
    (folder / "d.jsonl").write_text('{"txet": 1}\n{"txet": 2}\n')
    (folder / "e.csv").write_text("text,n\nhello,1\nragged\n")
    (folder / "f.epub").write_bytes(b"PK no book")
    (folder / "g.jsonl").write_text(json.dumps({"text": "x" * 5_000}) + '\n{"text": "short"}\n')
    (folder / "h.png").write_bytes(b"\x89PNG")
    made = run(Collect(kind="documents", sources=[str(folder)], max_row=4_000))
    assert texts(made) == [*good, "hello", "short"]
    rows = [(row["where"], row["reason"]) for row in read_rejects(made.path)]
    assert [where for where, _ in rows] == ["b.jsonl.gz", "c.jsonl", "d.jsonl", "e.csv:3", "f.epub", "g.jsonl:1"]
    assert "breaks off" in rows[0][1] and rows[1][1] == "no row of the file can be used"
    assert rows[5][1] == "is longer than a row may be" and made.metrics["skipped_files"] == {".png": 1}


def test_a_working_folder_under_git_and_hidden_folders_in_a_pattern_do_not_matter(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work/.git").mkdir(parents=True)
    jsonl(tmp_path / "work/a.jsonl", 2)
    jsonl(tmp_path / "work/.cache/b.jsonl", 3)
    (tmp_path / "work/.secret.jsonl").write_text('{"text": "hidden"}')
    monkeypatch.chdir(tmp_path / "work")
    for source, rows in (("a.jsonl", 2), ("*.jsonl", 2), (f"{tmp_path}/work/.cache/*.jsonl", 3), (".cache", 3)):
        assert run(Collect(kind="documents", sources=[source])).metrics["rows"] == rows, source


def test_a_source_without_one_usable_row_is_an_error_that_names_the_first(tmp_path: Path, run: Runner) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jsonl").write_text('{"txet": "1"}\n')
    jsonl(tmp_path / "good.jsonl", 3)
    with pytest.raises(FledgeError) as error:
        run(Collect(kind="documents", sources=[str(tmp_path / "good.jsonl"), str(tmp_path / "bad")]))
    assert str(error.value).startswith(str(tmp_path / "bad/a.jsonl")) and "txet" in str(error.value)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/x.bin").write_bytes(b"x")
    with pytest.raises(FledgeError, match="holds no data file"):
        run(Collect(kind="documents", sources=[str(tmp_path / "none")]))


def test_a_source_that_vanishes_after_planning_is_named(tmp_path: Path, run: Runner) -> None:
    jsonl(tmp_path / "in/a.jsonl", 3)
    jsonl(tmp_path / "in/b.jsonl", 3)
    stage = Collect(kind="documents", sources=[str(tmp_path / "in")])
    reader_for = collecting.sources.reader_for

    def gone(file: Path) -> str:
        (tmp_path / "in/b.jsonl").unlink(missing_ok=True)
        return reader_for(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting.sources, "reader_for", gone)
        with pytest.raises(FledgeError, match="is gone") as error:
            run(stage)
    assert error.value.problems[0].where == str(tmp_path / "in/b.jsonl")


def test_a_file_that_vanishes_while_others_are_read_is_named(tmp_path: Path, run: Runner) -> None:
    jsonl(tmp_path / "in/a.jsonl", 3)
    jsonl(tmp_path / "in/b.jsonl", 3)
    load = collecting.load

    def gone(file: Path, *rest: Any) -> Any:
        (tmp_path / "in/b.jsonl").unlink(missing_ok=True)
        return load(file, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "load", gone)
        with pytest.raises(FledgeError, match="is gone"):
            run(Collect(kind="documents", sources=[str(tmp_path / "in")]))


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Any:
    """A file system of 2 MB."""
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(
    tmp_path: Path, tiny_disk: Path, workers: int
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(4):
        rows = [json.dumps({"text": os.urandom(500).hex()}) for _ in range(2_500)]
        (source / f"{number}.jsonl").write_text("\n".join(rows))
    store = Store(tiny_disk / "home")
    values = {
        "name": "full", "execution": {"workers": workers},
        "stages": {"corpus": {"use": "data.collect", "kind": "documents", "sources": [str(source)]}},
    }  # fmt: skip
    with pytest.raises(StageFailed, match="the disk is full") as error:
        RecipeRunner(make_plan(from_values(values), store), store).run()
    (problem,) = error.value.problems
    assert str(tiny_disk) in problem.where and "FLEDGE_HOME" in problem.fix and "left" in problem.found
    assert not list(store.artifacts.iterdir()), "no artifact, not even a part of one"


def test_every_way_of_saying_that_the_disk_is_full_is_known() -> None:
    import errno

    assert disk.is_full(OSError(errno.ENOSPC, "x")) and disk.is_full(OSError(errno.EDQUOT, "x"))
    assert disk.is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    wrapped = ValueError("could not be written")
    wrapped.__cause__ = OSError(errno.ENOSPC, "x")
    assert disk.is_full(wrapped) and not disk.is_full(OSError(errno.ENOENT, "x")) and not disk.is_full(None)
