"""`fledge data sample`: rows chosen by hash."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from fledge.cli.main import cli
from fledge.data.inspection.sample import sample, sample_of
from fledge.records.formats import load
from fledge.records.kinds import Document, Labelled

from .conftest import corpus, write

ROWS = [Document(f"text {i}", str(i), "zh" if i % 10 == 0 else "en", f"s{i % 3}") for i in range(200)]


def test_it_does_not_depend_on_the_order() -> None:
    chosen = {record.id for record in sample(ROWS, 20)}
    shuffled = ROWS[:]
    random.Random(1).shuffle(shuffled)
    assert {record.id for record in sample(shuffled, 20)} == chosen and len(chosen) == 20
    assert [r.id for r in sample(ROWS, 20)] == sorted(chosen, key=int), "in the corpus' own order"
    assert chosen != {record.id for record in sample(ROWS, 20, seed=1)}
    assert chosen < {record.id for record in sample(ROWS, 50)}, "a larger sample holds the smaller"


def test_it_is_fair() -> None:
    often = Counter(int(r.id) // 50 for seed in range(40) for r in sample(ROWS, 20, seed=seed))
    assert sum(often.values()) == 800 and all(140 < times < 260 for times in often.values())


def test_so_many_of_each_group() -> None:
    assert Counter(r.language for r in sample(ROWS, 7, by="language")) == {"zh": 7, "en": 7}
    assert Counter(r.source for r in sample(ROWS, 5, by="source")) == {"s0": 5, "s1": 5, "s2": 5}
    labelled = [Labelled("t", "ab"[i == 3], str(i)) for i in range(9)]
    assert Counter(r.label for r in sample(labelled, 4, by="label") if isinstance(r, Labelled)) == {"a": 4, "b": 1}


def test_more_than_there_is_is_all_there_is_even_with_one_id() -> None:
    twice = [Document("a", "1"), Document("b", "1")]
    assert sample(twice, 5) == twice and len(sample(twice, 1)) == 1 and sample([], 3) == []


def test_the_command_prints_lines_and_writes_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", corpus(1, 20)).path
    _, wanted = sample_of(folder, 3, 5)
    printed = CliRunner().invoke(cli, ["data", "sample", str(folder), "-n", "3", "--seed", "5"])
    assert printed.exit_code == 0, printed.output
    assert [json.loads(line)["id"] for line in printed.output.splitlines()] == [record.id for record in wanted]
    file = tmp_path / "some.csv"
    result = CliRunner().invoke(cli, ["data", "sample", str(folder), "-n", "3", "--seed", "5", "--out", str(file)])
    assert result.exit_code == 0 and list(load(file, "documents")) == wanted


@pytest.mark.parametrize("options", [["-n", "0"], ["--by", "colour"]])
def test_wrong_options_are_named(tmp_path: Path, options: list[str]) -> None:
    folder = write(tmp_path / "a", corpus(1, 4)).path
    assert CliRunner().invoke(cli, ["data", "sample", str(folder), *options]).exit_code == 2
