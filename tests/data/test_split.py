"""The split: whole records held out, and nothing of them left in training. Leaks are looked for by other means here."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import fledge.data.split as split
from fledge.core.artifact import Artifact, Conversations, Documents
from fledge.data.stages import Split
from fledge.data.texts import size_of, text_of, units
from fledge.records.kinds import Document, Record
from fledge.records.rejects import read_rejects
from fledge.records.shards import read

from .conftest import Runner, chinese, corpus, digests, english, talk, write


def parts(made: dict[str, Artifact], kind: str = "documents") -> tuple[list[Record], list[Record]]:
    return list(read(made["train"], kind)), list(read(made["held_out"], kind))


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = units(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def laws(seed: int, count: int, shared: float) -> list[Document]:
    """Chinese documents of 20 paragraphs, a share of which stand, word for word or renumbered, in others too."""
    rng = random.Random(seed)
    pool = [chinese(rng, 2) for _ in range(40)]
    made = []
    for i in range(count):
        lines = [f"法{i}", "第一章 总则"]
        for j in range(20):
            lines.append(f"第{j}条 {rng.choice(pool)}" if rng.random() < shared else f"第{j}条 {chinese(rng, 2)}")
        made.append(Document("\n".join(lines), f"law{i}", "zh"))
    return made


def test_each_language_gets_its_bytes_and_nothing_is_lost_or_in_both(tmp_path: Path, run: Runner) -> None:
    rows = corpus(1, 120)
    made = run(Split(data="a", held_out="8kB"), {"a": write(tmp_path / "a", rows)})
    assert isinstance(made["train"], Documents) and isinstance(made["held_out"], Documents)
    train, held_out = parts(made)
    for language in ("en", "zh"):
        size = sum(size_of(r) for r in held_out if r.language == language)
        largest = max(size_of(r) for r in rows if r.language == language)
        assert 8_000 <= size <= 8_000 + largest
        assert made["train"].metrics["held_out_bytes"][language] == size
    assert sorted(r.id for r in train + held_out) == sorted(r.id for r in rows), "unlike texts: nothing removed"
    assert not list(read_rejects(made["held_out"].path))


def test_the_choice_depends_on_the_seed_and_not_on_the_order(tmp_path: Path, run: Runner) -> None:
    rows = laws(2, 40, shared=0.3) + corpus(2, 60)
    chosen = []
    for name, order in (("a", rows), ("b", random.Random(1).sample(rows, len(rows)))):
        made = run(Split(data="a", held_out="6kB"), {"a": write(tmp_path / name, order)})
        chosen.append({(r.id, text_of(r)) for r in parts(made)[1]})
    assert chosen[0] == chosen[1]
    other = run(Split(data="a", held_out="6kB"), {"a": Artifact(tmp_path / "a")}, seed=1)
    assert {r.id for r in parts(other)[1]} != {i for i, _ in chosen[0]}
    again = run(Split(data="a", held_out="6kB"), {"a": Artifact(tmp_path / "a")}, seed=1)
    assert digests(other["held_out"].path.parent) == digests(again["held_out"].path.parent)


def test_no_paragraph_of_the_held_out_part_stands_in_training(tmp_path: Path, run: Runner) -> None:
    rows = laws(3, 60, shared=0.5)
    made = run(Split(data="a", held_out="12kB"), {"a": write(tmp_path / "a", rows)})
    train, held_out = parts(made)
    known_lines = {line for r in train for line in text_of(r).split("\n")}
    known_grams = set().union(*(grams(text_of(r), 20) for r in train))
    checked = 0
    for record in held_out:
        for line in text_of(record).split("\n"):
            if len(line) >= 20:
                checked += 1
                assert line not in known_lines
                mine = grams(line, 20)
                assert len(mine & known_grams) <= 0.5 * len(mine)
    assert checked > 50
    assert sum(map(size_of, held_out)) >= 12_000, "more was held out until enough was left"
    removed = list(read_rejects(made["held_out"].path))
    assert len(removed) == sum(made["train"].metrics["removed"].values()) > 50
    assert {row["reason"] for row in removed} <= {
        "stands in training", "mostly stands in training", "nearly the same as a training record",
    }  # fmt: skip
    original = {r.id: r.text for r in rows}
    assert all(row["row"] in original[row["where"]] for row in removed), "what was taken out is kept"
    assert "第一章 总则" in text_of(held_out[0]), "short lines, such as headings, stay"


def test_a_line_too_short_for_an_n_gram_goes_when_it_stands_in_training_word_for_word(
    tmp_path: Path, run: Runner
) -> None:
    rng = random.Random(12)
    line = "All rights reserved worldwide."
    rows = [Document(f"{english(rng, 6)}\n{line}\nThe end.", f"d{i}", "en") for i in range(20)]
    _, held_out = parts(run(Split(data="a", held_out="2kB"), {"a": write(tmp_path / "a", rows)}))
    assert held_out
    for record in held_out:
        assert line not in text_of(record) and text_of(record).endswith("\nThe end."), "below 20 characters it stays"


def test_renumbered_copies_of_english_paragraphs_go_too(tmp_path: Path, run: Runner) -> None:
    rng = random.Random(4)
    shared = english(rng, 4)
    rows = [Document(f"{english(rng, 6)}\n({i}) {shared}\n{english(rng, 6)}", f"d{i}", "en") for i in range(30)]
    made = run(Split(data="a", held_out="3kB"), {"a": write(tmp_path / "a", rows)})
    _, held_out = parts(made)
    assert held_out and all(shared not in text_of(r) for r in held_out)
    assert made["train"].metrics["removed"] == {"mostly stands in training": len(held_out)}


def test_near_copies_of_whole_records_are_in_one_part_only(tmp_path: Path, run: Runner) -> None:
    """Each dialogue has a copy with a word changed here and there: too few for its 8-grams, but its 5-grams tell."""
    rng = random.Random(5)
    rows = []
    for i in range(60):
        turns = [english(rng, 2) if i % 2 else chinese(rng, 2) for _ in range(4)]
        rows.append(talk(*turns, id=f"a{i}", language="en" if i % 2 else "zh"))
        if i < 40:
            copy = [t.replace("the", "that", 1) if i % 2 else t.replace("法", "律", 1) for t in turns]
            rows.append(talk(*copy, id=f"b{i}", language="en" if i % 2 else "zh"))
    made = run(Split(data="a", held_out="2kB"), {"a": write(tmp_path / "a", rows)})
    assert isinstance(made["train"], Conversations)
    train, held_out = parts(made, "conversations")
    assert held_out
    for record in held_out:
        mine = grams(text_of(record), 5)
        nearest = max(len(mine & g) / len(mine | g) for g in (grams(text_of(other), 5) for other in train))
        assert nearest <= 0.5, record.id
    assert made["train"].metrics["removed"]["nearly the same as a training record"] > 0


def test_records_that_share_a_key_stay_together(tmp_path: Path, run: Runner) -> None:
    rng = random.Random(6)
    rows = [
        talk(f"第{j}条？", chinese(rng, 2), id=f"{i}-{j}", language="zh", meta={"law_name": f"法{i}"})
        for i in range(30)
        for j in range(5)
    ]
    made = run(Split(data="a", held_out="2kB", by="law_name"), {"a": write(tmp_path / "a", rows)})
    train, held_out = parts(made, "conversations")
    assert held_out and not {r.meta["law_name"] for r in train} & {r.meta["law_name"] for r in held_out}
    assert len(held_out) % 5 == 0


def test_a_small_language_keeps_four_fifths_and_a_single_record_is_for_training(tmp_path: Path, run: Runner) -> None:
    rows = [*corpus(7, 20), Document("Ein einziger deutscher Satz, der ganz allein steht.", "de0", "de")]
    made = run(Split(data="a", held_out="1MB"), {"a": write(tmp_path / "a", rows)})
    train, held_out = parts(made)
    assert {r.language for r in held_out} == {"en", "zh"}
    for language in ("en", "zh"):
        total = sum(size_of(r) for r in rows if r.language == language)
        held = sum(size_of(r) for r in held_out if r.language == language)
        assert 0.2 * total - 1 <= held <= 0.35 * total
    assert "de0" in {r.id for r in train}


def test_rows_without_a_language_are_given_to_the_one_they_are_in(tmp_path: Path, run: Runner) -> None:
    rows = [Document(d.text, d.id) for d in corpus(8, 60)]
    made = run(Split(data="a", held_out="3kB"), {"a": write(tmp_path / "a", rows)})
    assert set(made["train"].metrics["held_out_bytes"]) == {"en", "zh"}


def test_raw_files_may_stand_where_records_may(tmp_path: Path, run: Runner) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = random.Random(9)
    for i in range(12):
        (folder / f"{i}.txt").write_text(english(rng), encoding="utf-8")
    made = run(Split(data=str(folder), held_out=500), {str(folder): Artifact(folder)})
    train, held_out = parts(made)
    assert len(train) + len(held_out) == 12 and held_out


@pytest.mark.parametrize("value", [0, "-1kB"])
def test_nothing_to_hold_out_is_no_split(value: object) -> None:
    with pytest.raises(ValueError):
        Split(data="a", held_out=value)


def test_it_makes_no_difference_whether_the_records_fit_in_memory(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"a": write(tmp_path / "a", laws(10, 30, shared=0.4))}
    kept = run(Split(data="a", held_out="4kB"), data)
    monkeypatch.setattr(split, "IN_MEMORY", 5_000)
    again = run(Split(data="a", held_out="4kB"), data)
    assert digests(kept["train"].path.parent) == digests(again["train"].path.parent)
