"""Other ways of dividing records: three parts, by label, by date, K folds. Leaks are looked for by other means here."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fledge.core.artifact import Artifact, Conversations, Labelled
from fledge.core.errors import FledgeError
from fledge.data.arrangement import date_of
from fledge.data.stages import Split
from fledge.data.texts import size_of, text_of
from fledge.records.kinds import Document, Record
from fledge.records.kinds import Labelled as Row
from fledge.records.rejects import read_rejects
from fledge.records.shards import read

from .conftest import Runner, chinese, corpus, digests, english, talk, write
from .test_split import grams, laws


def ids(records: list[Record]) -> set[str]:
    return {record.id for record in records}


def rows_of(made: dict[str, Artifact], kind: str) -> dict[str, list[Record]]:
    return {name: list(read(part, kind)) for name, part in made.items()}


def labelled(seed: int, count: int) -> list[Row]:
    """Half of them English; of three labels one is rare."""
    rng = random.Random(seed)
    labels = rng.choices(["spam", "ham", "rare"], weights=[5, 4, 1], k=count)
    return [
        Row(english(rng, 2) if i % 2 else chinese(rng, 2), label, f"r{i}", "en" if i % 2 else "zh")
        for i, label in enumerate(labels)
    ]


def dated(seed: int, count: int) -> list[Document]:
    """A document a day, in both languages and in a random order, some of them undated."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        day = f"{2020 + i // 300}-{1 + i % 300 // 25:02}-{1 + i % 25:02}"
        spelled = day if i % 3 else "{}年{}月{}日".format(*map(int, day.split("-")))
        text, language = (english(rng, 3), "en") if i % 2 else (chinese(rng, 3), "zh")
        made.append(Document(text, f"d{i:03}", language, meta={} if i % 40 == 7 else {"published": spelled}))
    return rng.sample(made, len(made))


# --- three parts -----------------------------------------------------------------------------------------------------


def test_a_validation_part_stands_between_and_knows_nothing_of_the_others(tmp_path: Path, run: Runner) -> None:
    rows = laws(3, 80, shared=0.4) + corpus(4, 60)
    made = run(Split(data="a", held_out="8kB", validation="6kB"), {"a": write(tmp_path / "a", rows)})
    assert list(made) == ["train", "validation", "held_out"]
    found = rows_of(made, "documents")
    assert not ids(found["train"]) & ids(found["validation"]) and not ids(found["validation"]) & ids(found["held_out"])
    assert not ids(found["train"]) & ids(found["held_out"])
    for part, size, others in (
        ("held_out", 8_000, ("train", "validation")), ("validation", 6_000, ("train",)),
    ):  # fmt: skip
        known = {line for other in others for r in found[other] for line in text_of(r).split("\n") if len(line) >= 20}
        checked = [line for r in found[part] for line in text_of(r).split("\n") if len(line) >= 20]
        assert checked and not known & set(checked), part
        for language in ("en", "zh"):
            assert sum(size_of(r) for r in found[part] if r.language == language) >= size
    metrics = made["train"].metrics
    assert {"train_rows", "validation_rows", "held_out_rows", "validation_removed", "removed"} <= set(metrics)
    assert metrics["validation_rows"] == dict(sorted(Counter(r.language for r in found["validation"]).items()))
    two = run(Split(data="a", held_out="8kB"), {"a": Artifact(tmp_path / "a")})
    assert digests(two["held_out"].path) == digests(made["held_out"].path), "the held-out part is the same as without"


# --- by label --------------------------------------------------------------------------------------------------------


def test_every_label_gives_its_share_in_each_language(tmp_path: Path, run: Runner) -> None:
    rows = labelled(1, 600)
    made = run(Split(data="a", held_out="4kB", stratify="label"), {"a": write(tmp_path / "a", rows)})
    assert isinstance(made["train"], Labelled)
    held = rows_of(made, "labelled")["held_out"]
    for language in ("en", "zh"):
        whole = Counter[str]()
        for row in rows:
            whole[row.label] += size_of(row) * (row.language == language)
        mine = Counter[str]()
        for row in held:
            mine[row.label] += size_of(row) * (row.language == language)  # type: ignore[union-attr]
        largest = max(size_of(row) for row in rows)
        for label, size in whole.items():
            expected = 4_000 * size / whole.total()
            assert expected <= mine[label] <= expected + largest, (language, label)


def test_conversations_are_stratified_by_a_key_of_meta_and_a_lone_one_is_trained_on(
    tmp_path: Path, run: Runner
) -> None:
    rng = random.Random(2)
    rows = [
        talk("?", english(rng, 2), id=f"{i}", language="en", meta={"topic": "common" if i % 4 else "seldom"})
        for i in range(80)
    ]
    rows.append(talk("?", english(rng, 2), id="lone", language="en", meta={"topic": "once"}))
    made = run(Split(data="a", held_out="3kB", stratify="topic"), {"a": write(tmp_path / "a", rows)})
    assert isinstance(made["train"], Conversations)
    found = rows_of(made, "conversations")
    assert {r.meta["topic"] for r in found["held_out"]} == {"common", "seldom"}
    assert "lone" in ids(found["train"])


# --- by date ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2021", "2021-01-01"), ("2021-3-5", "2021-03-05"), ("2021/03/05", "2021-03-05"), ("2021.3.5", "2021-03-05"),
        ("20210305", "2021-03-05"), ("2021年3月5日", "2021-03-05"), ("2021年3月", "2021-03-01"),
        ("2021年 ", "2021-01-01"),
        ("2021-03-05T10:20:30Z", "2021-03-05T10:20:30Z"), ("2021-03-05 10:20", "2021-03-05T10:20"),
        ("", ""), ("soon", ""), ("2021-13-05", ""), ("1614902400", ""), ("3/5/2021", ""),
    ],
)  # fmt: skip
def test_dates_are_read_in_the_spellings_of_both_languages(text: str, expected: str) -> None:
    assert date_of(text) == expected


def test_what_is_later_is_held_out_and_what_has_no_date_is_not(tmp_path: Path, run: Runner) -> None:
    rows = dated(3, 200)
    made = run(Split(data="a", held_out="5kB", validation="4kB", time="published"), {"a": write(tmp_path / "a", rows)})
    found = rows_of(made, "documents")
    dates = {
        part: {
            language: [date_of(r.meta.get("published", "")) for r in records if r.language == language]
            for language in ("en", "zh")
        }
        for part, records in found.items()
    }
    for language in ("en", "zh"):
        train, validation, held = (dates[part][language] for part in ("train", "validation", "held_out"))
        assert max(train) <= min(validation) <= max(validation) <= min(held)
        assert all(validation) and all(held)
    undated = sum("published" not in r.meta for r in rows)
    assert made["train"].metrics["undated_rows"] == undated == train_without_date(found["train"]) > 0
    seeds = [
        run(Split(data="a", held_out="5kB", time="published"), {"a": Artifact(tmp_path / "a")}, seed=s) for s in (1, 2)
    ]
    assert ids(rows_of(seeds[0], "documents")["held_out"]) == ids(rows_of(seeds[1], "documents")["held_out"])


def train_without_date(records: list[Record]) -> int:
    return sum("published" not in r.meta for r in records)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"by": "lawname"}, r"^by: no record has such a key[\s\S]*lawname[\s\S]*id, published, words"),
        ({"stratify": "label"}, "^stratify: no record has such a key"),
        ({"time": "date"}, "^time: no record has such a key"),
        ({"time": "words"}, r"^time: no record has a date there[\s\S]*2021年3月5日"),
    ],
)
def test_a_key_that_no_record_has_is_refused(tmp_path: Path, run: Runner, keys: dict[str, str], words: str) -> None:
    rows = [Document(d.text, d.id, d.language, meta={**d.meta, "words": "some"}) for d in dated(1, 12)]
    with pytest.raises(FledgeError, match=words):
        run(Split(data="a", **keys), {"a": write(tmp_path / "a", rows)})


# --- folds -----------------------------------------------------------------------------------------------------------


def folded(made: dict[str, Any], kind: str, count: int) -> list[tuple[list[Record], list[Record]]]:
    """(training, held out) of every fold."""
    assert set(made) == {name for k in range(1, count + 1) for name in (str(k), f"train_{k}")}
    found = rows_of(made, kind)
    return [(found[f"train_{k}"], found[str(k)]) for k in range(1, count + 1)]


def test_every_record_is_held_out_once_and_trained_on_otherwise(tmp_path: Path, run: Runner) -> None:
    rows = labelled(5, 300)
    made = run(Split(data="a", folds=5, stratify="label"), {"a": write(tmp_path / "a", rows)})
    parts = folded(made, "labelled", 5)
    assert sorted(r.id for _, held in parts for r in held) == sorted(ids(list(rows)))
    for train, held in parts:
        assert ids(train) | ids(held) == ids(list(rows)) and not ids(train) & ids(held)
        for label, total in Counter(r.label for r in rows).items():
            share = sum(r.label == label for r in held)  # type: ignore[union-attr]
            assert abs(share - total / 5) <= 3, label
    sizes = [sum(map(size_of, held)) for _, held in parts]
    assert max(sizes) - min(sizes) <= 2 * max(map(size_of, rows))
    shuffled = random.Random(1).sample(rows, len(rows))
    again = run(Split(data="b", folds=5, stratify="label"), {"b": write(tmp_path / "b", shuffled)})
    assert [ids(held) for _, held in folded(again, "labelled", 5)] == [ids(held) for _, held in parts]
    strata = made["1"].metrics["strata"]
    assert set(strata) == {f"{a}/{b}" for a in ("en", "zh") for b in ("spam", "ham", "rare")}
    assert made["1"].metrics["folds"]["2"]["held_out_rows"] == dict(
        sorted(Counter(r.language for r in parts[1][1]).items())
    )


def test_groups_stay_whole_and_near_copies_are_not_measured_on(tmp_path: Path, run: Runner) -> None:
    rng = random.Random(6)
    rows, copies = [], 0
    for i in range(24):
        for j in range(3):
            text = chinese(rng, 4) if i % 2 else english(rng, 4)
            language = "zh" if i % 2 else "en"
            rows.append(talk("?", text, id=f"{i}-{j}", language=language, meta={"dialogue": f"g{i}"}))
            if j == 0 and i < 12:  # the same with a word changed, in another group
                near = text.replace("法", "律", 1) if i % 2 else text.replace("the", "that", 1)
                rows.append(talk("?", near, id=f"{i}-copy", language=language, meta={"dialogue": f"g{(i + 8) % 24}"}))
                copies += 1
    made = run(Split(data="a", folds=4, by="dialogue"), {"a": write(tmp_path / "a", rows)})
    parts = folded(made, "conversations", 4)
    gone = 0
    for number, (train, held) in enumerate(parts, 1):
        assert not {r.meta["dialogue"] for r in train} & {r.meta["dialogue"] for r in held}
        known = [grams(text_of(r), 5) for r in train]
        for record in held:
            mine = grams(text_of(record), 5)
            assert max(len(mine & g) / len(mine | g) for g in known) <= 0.5, record.id
        rejected = list(read_rejects(made[str(number)].path))
        gone += len(rejected)
        assert len(rejected) == sum(made["1"].metrics["folds"][str(number)]["removed"].values())
    assert gone > copies, "both of a pair in different folds are measured in neither"
    assert sum(len(held) for _, held in parts) + gone == len(rows), "nothing is lost"


def test_in_order_of_time_the_window_grows_and_the_future_is_measured_on(tmp_path: Path, run: Runner) -> None:
    rows = dated(8, 240)
    made = run(Split(data="a", folds=3, time="published"), {"a": write(tmp_path / "a", rows)})
    parts = folded(made, "documents", 3)
    sizes = []
    for number, (train, held) in enumerate(parts):
        for language in ("en", "zh"):
            before = [d for r in train if r.language == language and (d := date_of(r.meta.get("published", "")))]
            after = [date_of(r.meta.get("published", "")) for r in held if r.language == language]
            assert max(before) <= min(after) and all(after), number
        sizes.append(len(train))
        if number:
            assert ids(train) == ids(parts[number - 1][0]) | ids(parts[number - 1][1]), "the window expands"
    assert sizes == sorted(sizes) and abs(sizes[0] - len(rows) / 4) < 12, "four blocks of about one size"
    told = made["2"].metrics["folds"]["2"]
    assert told["from"] <= told["to"] and made["2"].metrics["undated_rows"] == 6


def test_too_few_groups_and_contradictory_wishes_are_refused(tmp_path: Path, run: Runner) -> None:
    with pytest.raises(FledgeError, match=r"too few groups[\s\S]*at most 3"):
        run(Split(data="a", folds=5), {"a": write(tmp_path / "a", corpus(1, 4)[:3])})
    assert [p.where for p in Split(data="a", folds=3, validation="1kB").check()] == ["validation"]
    assert [p.where for p in Split(data="a", time="day", stratify="label").check()] == ["stratify"]
    assert set(Split(data="a", folds=2).output_kinds()) == {"1", "train_1", "2", "train_2"}
