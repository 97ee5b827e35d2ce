"""The refinery: its steps in order, what it refuses kept, killed and gone on with the same result."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

import fledge.records.shards as shards
from fledge.core.artifact import Artifact, Conversations, Documents
from fledge.data.stages import Refine
from fledge.data.steps import RecordStep, Rejected
from fledge.data.texts import size_of
from fledge.records.kinds import Document, Record
from fledge.records.rejects import read_rejects
from fledge.records.shards import read

from .conftest import Runner, chinese, corpus, digests, english, talk, write


def dirty(seed: int = 0) -> list[Document]:
    """60 good documents and one bad one for each step."""
    rng = random.Random(seed)
    good = corpus(seed, 60)
    text = english(rng, 20)
    return [
        *good,
        Document("!!! ???", "blank"),
        Document("Niemand fragte nach diesem langen deutschen Text, der hier nicht hingehört.", "german"),
        Document("too short", "short", "en"),
        Document(good[0].text.upper(), "zz-same"),
        Document(text, "near"),
        Document(text + " Indeed.", "near-longer"),
        Document(english(rng) + " Write to anna@example.com or call +44 20 7946 0958.", "mail"),
        Document(chinese(rng) + "请联系李四lisi@qq.com，电话13812345678。", "邮件"),
    ]


STEPS = ["normalize", {"language": {"allowed": ["en", "zh"]}}, "quality", "exact_dedup", "minhash", "pii"]


def test_every_refused_row_is_kept_with_its_step_and_reason(tmp_path: Path, run: Runner) -> None:
    rows = dirty()
    made = run(Refine(data="a", steps=STEPS), {"a": write(tmp_path / "a", rows)})
    assert isinstance(made, Documents)
    kept = {record.id: record for record in read(made, "documents")}
    rejected = list(read_rejects(made.path))
    assert {(row["where"], row["step"]) for row in rejected} == {
        ("blank", "normalize"), ("german", "language"), ("short", "quality"), ("zz-same", "exact_dedup"),
        ("near", "minhash"),
    }  # fmt: skip
    assert set(kept) == {row.id for row in rows} - {row["where"] for row in rejected}
    by_id = {row.id: row for row in rows}
    for row in rejected:
        assert row["reason"] and json.loads(row["row"])["text"] == by_id[row["where"]].text, "the whole row is kept"
    assert kept["mail"].text.endswith("Write to [EMAIL] or call [PHONE].")  # type: ignore[union-attr]
    assert kept["邮件"].text.endswith("请联系李四[EMAIL]，电话[PHONE]。")  # type: ignore[union-attr]
    assert {record.language for record in kept.values()} == {"en", "zh"}


def test_the_metrics_add_up(tmp_path: Path, run: Runner) -> None:
    rows = dirty()
    made = run(Refine(data="a", steps=STEPS), {"a": write(tmp_path / "a", rows)})
    m = made.metrics
    kept = list(read(made, "documents"))
    assert m["rows_in"] == len(rows) and m["rows_out"] == len(kept)
    assert m["bytes_in"] == sum(map(size_of, rows)) and m["bytes_out"] == sum(map(size_of, kept))
    assert m["rows_in"] - m["rows_out"] == sum(n for reasons in m["rejected"].values() for n in reasons.values())
    assert m["rejected"]["exact_dedup"] == {"same text": 1}
    assert m["pii"] == {"email": 2, "phone": 2}
    assert m["bytes_by_language"] == {
        language: sum(size_of(r) for r in kept if r.language == language) for language in ("en", "zh")
    }
    assert set(m["seconds_by_step"]) == {"normalize", "language", "quality", "exact_dedup", "minhash", "pii"}
    assert json.loads(json.dumps(m)) == m


class Dies(RecordStep, name="dies"):
    """Passes some records, then ends the process as a signal would: without any clean-up of ours."""

    after: int = 25

    def look(self, record: Record, counts: Counter[str]) -> Record | Rejected:
        SEEN.append(record.id)
        if len(SEEN) == self.after and not SURVIVES:
            raise KeyboardInterrupt
        return record


SEEN: list[str] = []
SURVIVES: list[bool] = []


def test_killed_and_gone_on_it_reuses_what_was_finished(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_GROUP_ROWS", 10)
    SEEN.clear(), SURVIVES.clear()
    data = {"a": write(tmp_path / "a", dirty())}
    stage = Refine(data="a", steps=["normalize", "quality", "dies", "exact_dedup", "minhash", "pii"])
    with pytest.raises(KeyboardInterrupt):
        run(stage, data, work="shared")
    first = len(SEEN)
    SURVIVES.append(True)
    resumed = run(stage, data, work="shared")
    looked_at = len(SEEN) - first
    SEEN.clear()
    whole = run(stage, data, work="fresh")
    assert digests(resumed.path) == digests(whole.path)
    assert 0 < looked_at <= len(SEEN) - 20, "the two finished chunks were not done again"
    for key in ("rows_in", "rows_out", "rejected", "pii", "notes", "bytes_out"):
        assert resumed.metrics[key] == whole.metrics[key], key


def test_neither_chunks_nor_workers_change_anything(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Refine(data="a", steps=STEPS)
    whole = run(stage, {"a": write(tmp_path / "a", dirty())})
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_GROUP_ROWS", 7)
        small = {"a": write(tmp_path / "b", dirty())}
    assert digests(run(stage, small).path) == digests(whole.path)
    assert digests(run(stage, small, workers=2).path) == digests(whole.path)


def test_conversations_stay_conversations(tmp_path: Path, run: Runner) -> None:
    rng = random.Random(1)
    long = [english(rng, 3) for _ in range(4)]
    rows = [
        talk("hi", "hello!", id="short", language="en"),
        talk("你好", "你好呀", id="短", language="zh"),
        talk(*long, id="long"),
        talk(*long[:3], long[3] + " Bye.", id="longer"),
        talk("mail me", "at x@y.com", id="mail", language="en"),
    ]
    made = run(Refine(data="a"), {"a": write(tmp_path / "a", rows)})
    assert isinstance(made, Conversations)
    kept = {r.id: r for r in read(made, "conversations")}
    assert set(kept) == {"short", "短", "longer", "mail"}
    assert kept["mail"].messages[1].content == "at [EMAIL]"  # type: ignore[union-attr]


def test_malformed_lines_of_a_raw_file_are_set_aside(tmp_path: Path, run: Runner) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": f"answer {i}."}]} for i in range(5)]  # fmt: skip  # noqa: E501
    file.write_text("\n".join([*map(json.dumps, rows), "{not json"]), encoding="utf-8")
    made = run(Refine(data=str(file), steps=["normalize"]), {str(file): Artifact(file)})
    assert isinstance(made, Conversations) and made.metrics["rows_out"] == 5
    (bad,) = read_rejects(made.path)
    assert bad["row"] == "{not json" and bad["where"] == "chats.jsonl:6"


def test_no_step_is_a_copy(tmp_path: Path, run: Runner) -> None:
    rows = corpus(3, 10)
    made = run(Refine(data="a", steps=[]), {"a": write(tmp_path / "a", rows)})
    assert list(read(made, "documents")) == rows


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (["minhas"], 'there is no step "minhas".*did you mean "minhash"'),
        ([{"minhash": {"treshold": 0.8}}], 'no option "treshold".*did you mean "threshold"'),
        ([{"minhash": {"threshold": 7}}], "step minhash, threshold: Input should be less than or equal to 1"),
        ([{"pii": {"kinds": ["mail"]}}], 'step pii, kinds.*"mail" is not one of.*did you mean "email"'),
        ([{"language": {}, "pii": {}}], "must be the name of a step"),
        ([3], "must be the name of a step"),
    ],
)
def test_wrong_steps_are_refused_with_what_is_allowed(steps: list[object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Refine(data="a", steps=steps)


def test_steps_in_a_fingerprint_spell_out_all_their_options() -> None:
    stage = Refine(data="a", steps=["exact_dedup", {"minhash": {"threshold": 0.8}}])
    said = stage.model_dump(mode="json")["steps"]
    assert said == ["exact_dedup", {"minhash": {"ngram": 5, "bands": 14, "rows": 8, "threshold": 0.8}}]
    assert Refine(data="a", steps=said) == stage, "and can be read back"
