"""The rate range test: the rates it takes, what it suggests, and what is usual."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fledge.core.artifact import Conversations, Model, Study
from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.plan import make_plan
from fledge.core.recipe import load
from fledge.core.stage import Execution, Size
from fledge.core.store import Store
from fledge.models.save import save_model
from fledge.records.kinds import Conversation, Message
from fledge.records.shards import ShardWriter
from fledge.training.optimization.schedule import lr_factor
from fledge.training.search.rate_range import ramped, rate_at, suggestion
from fledge.training.search.stages import RateRange
from fledge.training.search.usual import USUAL, advice
from fledge.training.settings import TrainSettings
from fledge.training.stages import SFT, DirectPreferences, Pretrain
from tests.training.toys import tiny, tokenizer

OF = {"use": "train.sft", "model": "m", "data": "d", "train": {"dtype": "float32", "batch_size": 8, "max_length": 48}}


def test_the_ramp_goes_from_the_lowest_to_the_highest_in_equal_factors() -> None:
    stage = RateRange(of=OF, lowest=1e-5, highest=1e-1, steps=40)
    train: Any = ramped(stage).train  # type: ignore[attr-defined]
    rates = [train.lr * lr_factor(step, 40, train) for step in range(40)]
    assert rates == pytest.approx([rate_at(step, stage) for step in range(40)], rel=1e-9)
    assert rates[-1] == pytest.approx(1e-1) and rates[0] == pytest.approx(1e-5 * 1e4 ** (1 / 40))
    factors = [b / a for a, b in pairwise(rates)]
    assert factors == pytest.approx([factors[0]] * 39)
    pre = {
        "use": "train.pretrain",
        "data": "d",
        "tokenizer": "t",
        "model": {"size": "1M"},
        "tokens": "9M",
        "held_out": {"en": "e"},
    }
    inner: Any = ramped(RateRange(of=pre, steps=30))
    assert inner.steps == 30 and inner.held_out == {}
    assert inner.train.muon_lr / inner.train.lr == pytest.approx(0.02 / 3e-3), "both rates rise together"


def test_the_suggestion_is_where_the_loss_falls_fastest_but_well_before_it_bursts() -> None:
    rates = [10 ** (-6 + 6 * i / 99) for i in range(100)]
    # falls fastest at 1e-3, is lowest where the parabola takes over, near 0.05
    curve = [3 - 1 / (1 + (1e-3 / r) ** 1.5) + 40 * max(0.0, math.log10(r) + 1.3) ** 2 for r in rates]
    found = suggestion(rates, curve)
    assert found["steepest_lr"] == pytest.approx(1e-3, rel=0.15) and 0.03 < found["lowest_loss_lr"] < 0.08
    assert found["suggested_lr"] == pytest.approx(1e-3, rel=0.15)
    late = suggestion(rates, [3 - 1 / (1 + (1e-2 / r) ** 4) + 40 * max(0.0, math.log10(r) + 1.5) ** 2 for r in rates])
    assert late["lowest_loss_lr"] / 11 < late["suggested_lr"] < late["lowest_loss_lr"] / 9
    assert late["suggested_lr"] < late["steepest_lr"]
    with pytest.raises(FledgeError, match="falls at none"):
        suggestion(rates, [2 + i / 100 for i in range(100)])


@pytest.fixture
def chats(tmp_path: Path) -> dict[str, Any]:
    names = tokenizer()
    save_model(tiny(vocab=len(names)), names, tmp_path / "model")
    with ShardWriter(tmp_path / "chats", "conversations") as shards:
        for i in range(64):
            shards.write(Conversation((Message("user", f"hello {i}"), Message("assistant", "你好 hello there " * 2))))
    return {"m": Model(tmp_path / "model"), "d": Conversations(tmp_path / "chats")}


def test_a_suggested_rate_trains_better_than_one_far_from_it(
    chats: dict[str, Any], tmp_path: Path, events: Emitter, heard: list[Event]
) -> None:
    def run(stage: Any, name: str) -> Any:
        folder = tmp_path / name
        (folder / "out").mkdir(parents=True)
        return stage.run(Job(name, folder / "out", folder / "work", 0, Execution(), events, chats))

    made = run(RateRange(of=OF, lowest=1e-6, highest=10.0, steps=60), "range")
    assert type(made) is Study and not Study.problem_with(made.path)
    study = json.loads((made.path / "study.json").read_text())
    rates = [point[0] for point in study["points"]]
    assert len(rates) == made.metrics["steps"] == sum(e.name == "loss" for e in heard)
    assert rates == sorted(rates) and sorted(f.name for f in made.path.iterdir()) == ["study.json", "study.svg"]
    assert not (tmp_path / "range" / "work" / "range").exists(), "what was trained is thrown away"
    rate = made.metrics["suggested_lr"]
    assert 3e-4 < rate < 0.3
    again = run(RateRange(of=OF, lowest=1e-6, highest=10.0, steps=60), "again")
    assert (again.path / "study.svg").read_bytes() == (made.path / "study.svg").read_bytes()
    tuned = {key: value for key, value in OF.items() if key != "use"}
    losses = {}
    for lr in (rate / 100, rate):
        train: Any = {**dict(OF["train"]), "lr": lr, "steps": 12}  # type: ignore[arg-type]
        losses[lr] = run(SFT(**{**tuned, "train": train}), f"at {lr}").metrics["final_loss"]
    assert losses[rate] < 0.8 * losses[rate / 100]


def test_a_stage_within_a_stage_is_checked_and_fingerprinted_like_any_other(
    chats: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    of = {"use": "train.sft", "model": str(chats["m"].path), "data": str(chats["d"].path)}
    stage = {"use": "search.rate_range", "steps": 30, "of": of}
    file.write_text(json.dumps({"name": "r", "stages": {"range": stage}}), encoding="utf-8")
    store = Store()
    plan = make_plan(load(file), store)
    described = plan.steps[0].description
    assert set(described["inputs"]) == {"of.model", "of.data.0"} and described["config"]["of"]["model"] == "→"
    other = make_plan(load(file, ["range.of.train.batch_size=4"]), store)
    assert other.steps[0].fingerprint != plan.steps[0].fingerprint
    rebuilt = RateRange.model_validate(plan.steps[0].node.stage.config_values())
    assert rebuilt.of.config_values() == plan.steps[0].node.stage.of.config_values()  # type: ignore[attr-defined]
    for wrong, words in (
        ("range.of.use=train.stf", "train.sft"),
        ("range.of.rate=3", "rate"),
        ("range.lowest=2", "above"),
    ):
        with pytest.raises(FledgeError, match=words):
            load(file, [wrong])


def test_what_is_usual_depends_on_method_and_size() -> None:
    for usual in USUAL.values():
        sizes = [n for n, _ in usual.points]
        assert sizes == sorted(sizes)
        for size, rate in usual.points:
            assert usual.rate(size) == pytest.approx(rate)
            low, high = usual.range(size)
            assert low < rate < high and usual.range(size, lora=True)[0] == pytest.approx(10 * low)
        assert usual.rate(1.0) == usual.points[0][1] and usual.rate(1e15) == usual.points[-1][1]
    between = USUAL["pretrain"].rate(math.sqrt(125e6 * 1.3e9))
    assert between == pytest.approx(math.sqrt(6e-4 * 2e-4)), "in logarithms"
    assert list(advice("sft", TrainSettings(lr=2e-5), 7e9)) == []
    (told,) = advice("sft", TrainSettings(lr=2e-2), 7e9)
    assert told.startswith("train.lr is 0.02; usual here is") and "Alpaca" in told
    assert list(advice("sft", TrainSettings(lr=2e-4), 7e9, lora=True)) == []
    assert len(list(advice("sft", TrainSettings(lr=2e-2), 0))) == 0, "nothing is known of the size"
    assert len(list(advice("dpo", TrainSettings(lr=5e-7), 7e9, beta=5.0))) == 1
    assert "muon_lr" in next(advice("pretrain", TrainSettings(optimizer="muon", muon_lr=1.0), 1e6))


def test_a_plan_warns_and_goes_on() -> None:
    sizes = {"m": Size(parameters=135e6)}
    tuned = SFT(model="m", data="d", train={"lr": 1.0})
    assert len(list(tuned.advice(sizes))) == 1 and list(tuned.check()) == []
    assert len(list(DirectPreferences(model="m", data="d", beta=9.0, train={"lr": 1.0}).advice(sizes))) == 2
    base = Pretrain(data="d", tokenizer="t", model={"size": "2M"}, tokens="1M", train={"optimizer": "adamw", "lr": 1.0})
    assert len(list(base.advice({}))) == 1


def test_the_recipes_of_the_house_are_within_what_is_usual() -> None:
    root = Path(__file__).parents[2]
    for file in sorted((root / "recipes").glob("*.yaml")):
        plan = make_plan(load(file), Store())
        assert [note for step in plan.steps for note in step.estimate.notes if "usual" in note] == [], file.name
