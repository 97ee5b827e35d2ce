"""De-duplication in the refinery: against earlier corpora and their indexes, with many processes, killed, and in
little memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import fledge.records.shards as shards
from fledge.core.artifact import Artifact
from fledge.data.dedup.index import find_index
from fledge.data.stages import Refine
from fledge.data.steps import CorpusStep, ExactDedup, LineDedup, NearDedup, SimHashDedup, SubstringDedup, write_step
from fledge.data.steps.base import Sketches
from fledge.records.kinds import Document
from fledge.records.rejects import read_rejects
from fledge.records.shards import read

from .conftest import Runner, chinese, digests, english, write
from .test_duplicates import sketched, variant

STEPS: list[CorpusStep] = [ExactDedup(), NearDedup(), SimHashDedup(distance=6, blocks=8)]


def old_and_new(seed: int = 3) -> tuple[list[Document], list[Document]]:
    """Two corpora: of each five new texts one is an old one again, longer; one a repetition of another new one."""
    rng = random.Random(seed)
    old = [Document((english if i % 2 else chinese)(rng, 14), f"old{i}") for i in range(20)]
    new = []
    for i in range(20):
        fresh = (english if i % 2 else chinese)(rng, 14)
        new += [
            Document(fresh, f"fresh{i}"),
            Document(old[i].text + " !!", f"same{i}"),
            Document(old[i].text + (" Indeed." if i % 2 else "确实。"), f"near{i}"),
            Document(fresh, f"again{i}"),
            Document((english if i % 2 else chinese)(rng, 14) + "\n" + old[i].text, f"quotes{i}"),
        ]
    return old, rng.sample(new, len(new))


def kept(made: Artifact) -> dict[str, str]:
    return {record.id: record.text for record in read(made, "documents")}  # type: ignore[union-attr]


@pytest.mark.parametrize("step", STEPS)
def test_what_an_earlier_corpus_holds_goes_whatever_its_rank(tmp_path: Path, run: Runner, step: CorpusStep) -> None:
    old, new = old_and_new()
    data = {"new": write(tmp_path / "new", new), "old": write(tmp_path / "old", old)}
    made = run(Refine(data="new", against=["old"], steps=[step]), data)
    gone = {row["where"]: row for row in read_rejects(made.path)}
    repeats = ("same",) if isinstance(step, ExactDedup) else ("same", "near")
    for i in range(20):
        for name in repeats:
            assert gone[f"{name}{i}"]["reason"].endswith("as in an earlier corpus")
            assert gone[f"{name}{i}"]["value"] == f"old{i}"
        assert (f"fresh{i}" in gone) is not (f"again{i}" in gone), "one of two new ones stays"
    assert set(kept(made)) == {record.id for record in new} - set(gone)
    assert not any(name.startswith("old") for name in kept(made))
    alone = {row["where"] for row in read_rejects(run(Refine(data="new", steps=[step]), data).path)}
    assert "same0" not in alone or "near0" not in alone


def test_passages_of_an_earlier_corpus_are_cut(tmp_path: Path, run: Runner) -> None:
    old, new = old_and_new()
    quotes = [record for record in new if record.id.startswith("quotes")]
    data = {"new": write(tmp_path / "new", quotes), "old": write(tmp_path / "old", old)}
    by_id = {record.id: record.text for record in old}
    for step in ("substring", "lines"):
        made = run(Refine(data="new", against=["old"], steps=[step]), data)
        for name, text in kept(made).items():
            assert by_id["old" + name.removeprefix("quotes")] not in text and len(text) > 100
        assert made.metrics["notes"][f"{step}/texts"] == len(quotes)
        assert not run(Refine(data="new", steps=[step]), data).metrics["notes"]


@pytest.mark.parametrize("step", [*STEPS, SubstringDedup(words=20, characters=40), LineDedup()])
def test_an_index_says_what_reading_again_would_say(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch, step: CorpusStep
) -> None:
    monkeypatch.setattr(shards, "_GROUP_ROWS", 9)
    old, new = old_and_new()
    old += [Document(record.text, record.id + "w") for record in old[:8]]
    if not isinstance(step, SubstringDedup):  # which sees in an index what it cut from the texts
        old += [Document(variant(record.text, 0.02, random.Random(1)), record.id + "v") for record in old[:8]]
    data = {"new": write(tmp_path / "new", new), "raw": write(tmp_path / "raw", old)}
    data["old"] = run(Refine(data="raw", steps=[step], keep_index=True), data)
    stage = Refine(data="new", against=["old"], steps=[step])
    made = run(stage, data)
    assert not list((tmp_path / "jobs" / f"work{run.attempts}").glob("against-*")), "the old corpus is not read"
    plain = Artifact(tmp_path / "plain")
    (tmp_path / "plain").mkdir()
    (data["old"].path / "records").rename(tmp_path / "plain" / "records")
    again = run(stage, {**data, "old": plain})
    assert list((tmp_path / "jobs" / f"work{run.attempts}").glob("against-*"))
    assert digests(made.path) == digests(again.path)
    assert digests(made.path) != digests(run(Refine(data="new", steps=[step]), data).path)


def test_an_index_made_with_other_options_is_not_used(tmp_path: Path, run: Runner) -> None:
    old, new = old_and_new()
    data = {"new": write(tmp_path / "new", new), "raw": write(tmp_path / "raw", old)}
    data["old"] = run(Refine(data="raw", steps=[{"minhash": {"bands": 20}}], keep_index=True), data)
    folder = data["old"].path / "index" / "00-minhash"
    assert json.loads((folder / "index.json").read_text())["rows"] == 20
    assert find_index(data["old"], write_step(NearDedup(bands=20)), "documents", tmp_path) is not None
    assert find_index(data["old"], write_step(NearDedup()), "documents", tmp_path) is None
    assert find_index(data["old"], write_step(NearDedup(bands=20)), "labelled", tmp_path) is None
    made = run(Refine(data="new", against=["old"], steps=["minhash"]), data)
    assert any("other options of minhash" in str(event) for event in run.events if event.kind == "message")
    assert not any(name.startswith(("same", "near")) for name in kept(made))


def test_an_index_holds_only_what_stayed(tmp_path: Path, run: Runner) -> None:
    old, _ = old_and_new()
    data = {"raw": write(tmp_path / "raw", [*old, *(Document(record.text, "x" + record.id) for record in old)])}
    made = run(Refine(data="raw", steps=["exact_dedup"], keep_index=True), data)
    index = find_index(made, "exact_dedup", "documents", tmp_path)
    assert index is not None and index.rows == 40
    assert {name for table in index.tables(["id"]) for name in table["id"].to_pylist()} == set(kept(made))


def test_neither_workers_nor_kills_nor_chunks_change_anything(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = old_and_new()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_GROUP_ROWS", 7)
        small = {"new": write(tmp_path / "small", new), "old": write(tmp_path / "old-small", old)}
    data = {"new": write(tmp_path / "new", new), "old": write(tmp_path / "old", old)}
    steps = ["minhash", {"substring": {"words": 20, "characters": 40}}]
    stage = Refine(data="new", against=["old"], steps=steps, keep_index=True)
    whole, parts = run(stage, data), run(stage, small)
    for folder in ("records", "rejected"):
        assert digests(parts.path / folder) == digests(whole.path / folder)
    by_two = [run(Refine(data="new", steps=steps[1:], keep_index=True), small, workers=n).path for n in (1, 2)]
    assert digests(by_two[0]) == digests(by_two[1])
    decided: list[str] = []
    for name in ("minhash", "substring"):
        with monkeypatch.context() as patch:
            step = next(cls for cls in (NearDedup, SubstringDedup) if cls.name == name)

            def dies(self: CorpusStep, sketches: Sketches, earlier: list[Sketches], name: str = name) -> None:
                (sketches.scratch / "half.bucket").write_bytes(b"half")
                decided.append(name)
                raise KeyboardInterrupt

            patch.setattr(step, "decide", dies)
            with pytest.raises(KeyboardInterrupt):
                run(stage, small, work="killed")
    assert decided == ["minhash", "substring"]
    assert digests(run(stage, small, work="killed").path) == digests(parts.path)


@pytest.mark.parametrize("step", [*STEPS, SubstringDedup(), LineDedup()])
def test_nothing_in_nothing_out(tmp_path: Path, step: CorpusStep) -> None:
    empty = Sketches([], [], 0, tmp_path)
    assert step.decide(empty, []).num_rows == 0
    lone = sketched(step, [Document("A single text.", "a"), Document("", "b")], tmp_path / "lone")
    assert step.decide(lone, [empty]).num_rows == 0


PEAK = """
import resource, sys
import numpy as np, pyarrow as pa
from pathlib import Path
from fledge.data.dedup.minhash import MinHash
from fledge.data.passes import write_table
from fledge.data.steps import NearDedup, Sketches

folder, rows = Path(sys.argv[1]), int(sys.argv[2])
rng, files, starts = np.random.default_rng(0), [], list(range(0, rows, 2_000))
for start in starts:
    signatures = rng.integers(0, 2**32, (2_000, 112), dtype=np.uint32)
    signatures[1_800:] = signatures[:200]  # a tenth are copies
    files.append(folder / f"{start}.arrow")
    write_table(pa.table({
        "row": np.arange(2_000), "length": rng.integers(0, 9_999, 2_000),
        "name": rng.integers(0, 2**63, 2_000).astype(np.uint64), "id": [f"document {start + i}" for i in range(2_000)],
        "signature": pa.array([signature.tobytes() for signature in signatures], pa.binary(448)),
        "bands": pa.array([bands.tobytes() for bands in MinHash().bands_of(signatures)], pa.binary(112)),
    }), files[-1], None)
(folder / "scratch").mkdir()
verdicts = NearDedup().decide(Sketches(files, starts, rows, folder / "scratch"), [])
assert verdicts.num_rows == rows // 10
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_grows_by_a_few_bytes_a_row(tmp_path: Path) -> None:
    """20,000 and 200,000 sketches of 448 bytes each: 80 MB more on disk, much less in memory."""
    peaks = []
    for rows in (20_000, 200_000):
        (tmp_path / str(rows)).mkdir()
        command = [sys.executable, "-c", PEAK, str(tmp_path / str(rows)), str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 60, "MiB, for 180,000 rows of which 18,000 are refused"
