"""Scaling laws: planted coefficients come back, a small study from end to end, and whose the jump of emergence is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fledge.core.artifact import Artifact, Documents, Model, Tokenizer
from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.stage import Execution
from fledge.records.kinds import Document
from fledge.records.shards import ShardWriter
from fledge.training.estimation.optimal import BESIROGLU, HOFFMANN, Law
from fledge.training.scaling.emergence import Measured, emergence, measure, suddenness
from fledge.training.scaling.law import Fit, Point, fit_law
from fledge.training.scaling.runs import all_runs
from fledge.training.scaling.stages import Scaling
from tests.training.toys import tokenizer

COEFFICIENTS = ("irreducible", "size_scale", "size_power", "data_scale", "data_power")


def planted(law: Law, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """8 sizes by 7 lengths in the range of Hoffmann et al. (2022)."""
    rng = np.random.default_rng(seed)
    grid = [(n, d) for n in np.geomspace(5e7, 1e10, 8) for d in np.geomspace(1e9, 3e11, 7)]
    return [Point(n, d, law.loss(n, d) * float(np.exp(noise * rng.normal()))) for n, d in grid]


@pytest.mark.parametrize("law", [BESIROGLU, HOFFMANN])
def test_without_noise_the_planted_coefficients_come_back(law: Law) -> None:
    found = fit_law(planted(law), samples=50)
    for name in COEFFICIENTS:
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=1e-4), name
    assert found.error < 1e-6


def test_with_noise_they_lie_in_their_intervals() -> None:
    """Chinchilla's numbers with half a per cent of noise: most coefficients of most draws are inside 95 %."""
    fits = [fit_law(planted(BESIROGLU, 0.005, seed), samples=200, level=0.95) for seed in range(3)]
    inside = [
        low <= getattr(BESIROGLU, name) <= high
        for fit in fits
        for name in COEFFICIENTS
        for low, high in [fit.interval(name)]
    ]
    assert np.mean(inside) >= 0.8
    for fit in fits:
        low, high = fit.interval("size_power")
        assert 0.005 < high - low < 0.1, "neither certain nor idle"
        assert fit.error == pytest.approx(0.005, rel=0.3)


def test_a_larger_run_is_predicted_with_an_interval() -> None:
    fits = [fit_law(planted(BESIROGLU, 0.005, seed), samples=100) for seed in range(4)]
    rng = np.random.default_rng(9)
    hits = []
    for fit in fits:
        said = fit.predict(7e10, 1.4e12)
        assert said.low < said.loss < said.high and said.high - said.low < 0.1
        for _ in range(20):
            hits.append(said.low <= BESIROGLU.loss(7e10, 1.4e12) * float(np.exp(0.005 * rng.normal())) <= said.high)
    assert np.mean(hits) > 0.7
    assert not fits[0].predict(7e10, 1.4e12).low <= 1.8 <= fits[0].predict(7e10, 1.4e12).high


def test_one_wild_run_does_not_move_the_law() -> None:
    points = planted(BESIROGLU)
    points[20] = Point(points[20].parameters, points[20].tokens, 2 * points[20].loss)
    assert fit_law(points, samples=50).law.size_power == pytest.approx(BESIROGLU.size_power, rel=0.02)


def test_only_what_moves_is_fitted() -> None:
    sizes = [Point(n, 1e9, 1.8 + 400 * n**-0.34) for n in np.geomspace(1e6, 1e8, 6)]
    found = fit_law(sizes, samples=50).law
    assert found.size_power == pytest.approx(0.34, rel=1e-3) and found.data_scale == 0
    together = [Point(n, 20 * n, 1.8 + 400 * n**-0.34) for n in np.geomspace(1e6, 1e8, 6)]
    assert fit_law(together, samples=50).law.data_scale == 0, "size and tokens grow together: one law"
    for wrong in (sizes[:3], [Point(1e6, 1e9, 2.0)] * 6, planted(BESIROGLU)[:1]):
        with pytest.raises(FledgeError, match="too few runs"):
            fit_law(wrong)


def test_the_fit_is_the_same_each_time() -> None:
    first, second = (fit_law(planted(BESIROGLU, 0.01), samples=60, seed=3) for _ in range(2))
    assert first.law == second.law and first.samples == second.samples


def test_the_jump_is_the_measures() -> None:
    """Schaeffer et al. (2023), section 2: tokens get right smoothly, a string of 10 all at once."""
    sizes = np.geomspace(1e7, 1e11, 9)
    nll = [float((n / 5e8) ** -0.35) for n in sizes]
    runs = [
        Measured(str(n), n, 20 * n, loss, {1: float(np.exp(-loss)), 10: float(np.exp(-10 * loss))})
        for n, loss in zip(sizes, nll, strict=True)
    ]
    found = emergence(runs, [1, 10])
    assert found["suddenness"]["exact_10"] > 1.5 * found["suddenness"]["exact_1"]
    assert found["expected_from_single_tokens"]["exact_10"] == pytest.approx([run.exact[10] for run in runs])
    half = [run for run in runs if run.exact[10] < 0.01]
    assert len(half) >= 5 and half[-1].nll < 0.2 * half[0].nll, "the loss fell all the while nothing 'emerged'"
    assert suddenness([1, 2, 3, 4]) == pytest.approx(1) and suddenness([1, 1, 1, 4]) == pytest.approx(3)


class _Alternating(torch.nn.Module):
    """Says token (t + 1) mod 4 with certainty of 60 %."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.full((*input_ids.shape, 4), np.log(0.4 / 3))
        logits.scatter_(-1, ((input_ids + 1) % 4)[..., None], np.log(0.6))
        return type("Output", (), {"logits": logits})


def test_both_measures_are_counted_right() -> None:
    rows = [[0, 1, 2, 3, 0, 0, 1, 2, 3]]  # one of eight steps is not the next number
    nll, exact = measure(_Alternating(), rows, [1, 2, 4])
    assert exact == {1: 7 / 8, 2: 3 / 4, 4: 1 / 2}
    assert nll == pytest.approx(-(7 * np.log(0.6) + np.log(0.4 / 3)) / 8, rel=1e-6)


# --- the stage -------------------------------------------------------------------------------------------------------


def stage(**changes: Any) -> Scaling:
    of = {
        "use": "train.pretrain", "data": ["text"], "tokenizer": "tokenizer", "seq_len": 32,
        "model": {"size": "10k", "head_dim": 8}, "tokens": 4000, "held_out": {"en": "held"}, "held_out_bytes": "500",
        "train": {"batch_size": 4, "optimizer": "adamw", "lr": 0.01, "dtype": "float32"},
    }  # fmt: skip
    given: dict[str, Any] = {
        "of": of, "sizes": ["15k", "30k", "60k"], "tokens": [1000, 4000], "samples": 60,
        "check_on": {"size": "90k", "tokens": 6000}, "emergence": {"data": "held", "texts": 4, "lengths": [1, 2]},
    }  # fmt: skip
    return Scaling(**{**given, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("world")
    tokenizer().save_pretrained(root / "tokenizer")
    rng = random.Random(0)
    words = ["hello", "there", "you", "are", "here"]
    for name, count in (("text", 60), ("held", 8)):
        with ShardWriter(root / name, "documents") as shards:
            for _ in range(count):
                shards.write(Document(" ".join(rng.choices(words, k=20))))
    return {
        "tokenizer": Tokenizer(root / "tokenizer"), "text": Documents(root / "text"), "held": Documents(root / "held"),
    }  # fmt: skip


def carry_out(asked: Scaling, world: dict[str, Artifact], folder: Path, heard: list[Event]) -> Artifact:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    (folder / "out").mkdir()
    job = Job("laws", folder / "out", folder / "work", 0, Execution(), Emitter("laws", 0, heard.append), world)
    return asked.run(job)


def test_a_study_from_small_runs_to_the_check(
    world: dict[str, Artifact], tmp_path: Path, heard: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
    made = carry_out(stage(), world, tmp_path / "a", heard)
    study = json.loads((made.path / "study.json").read_text())
    assert len(study["points"]) == 6 and made.metrics["runs"] == 6
    for point in study["points"]:
        assert point["loss"] == pytest.approx(point["predicted"], rel=0.2), point["name"]
    shown = {point["name"]: point for point in study["points"]}
    assert shown["60.0k-4.0k"]["loss"] < shown["15.0k-1.0k"]["loss"], "larger and longer is better"
    assert study["predicted_low"] < study["predicted_loss"] < study["predicted_high"]
    assert study["inside"] == (study["predicted_low"] <= study["check"]["loss"] <= study["predicted_high"])
    assert "<svg" in (made.path / "study.svg").read_text()
    assert len(study["emergence"]) == 7 and set(study["suddenness"]) == {"nll", "exact_1", "exact_2"}
    for run in study["emergence"]:
        assert run["exact"]["2"] <= run["exact"]["1"] <= 1 and run["nll"] > 0
    assert any(event.name == "loss/15.0k-1.0k" for event in heard), "each run's curve has its own name"

    heard.clear()
    (made.path).rename(tmp_path / "first")
    again = carry_out(stage(), world, tmp_path / "a", heard)
    assert not [event for event in heard if event.name.startswith("loss/")], "what was trained is not trained again"
    assert (again.path / "study.json").read_bytes() == (tmp_path / "first" / "study.json").read_bytes()

    points = {f"m{i}": Model(tmp_path / "x", {k: p[k] for k in ("parameters", "tokens")} | {"final_loss": p["loss"]})
              for i, p in enumerate(study["points"])}  # fmt: skip
    given = Scaling(models={name: name for name in points}, samples=60)
    taken = carry_out(given, {**points}, tmp_path / "b", heard)
    fitted = json.loads((taken.path / "study.json").read_text())
    assert fitted["size_power"] == pytest.approx(study["size_power"], rel=1e-6)
    points["m0"] = Model(tmp_path / "x", {"parameters": 1000})
    with pytest.raises(FledgeError, match="says too little"):
        carry_out(given, {**points}, tmp_path / "c", heard)


def test_what_makes_no_study_is_said_before_it_starts() -> None:
    assert [name for name, _ in all_runs(stage())][-1] == "90.0k-6.0k"
    assert not list(stage().check())
    assert "too few runs" in str(next(stage(sizes=["10k"], tokens=[1000]).check()).what)
    assert list(stage(sizes=[], tokens=[]).check())
    assert list(stage(check_model="big").check())
    sft = {"use": "train.sft", "model": "m", "data": ["d"]}
    assert any("pre-training" in problem.what for problem in stage(of=sft).check())


def test_a_fit_knows_its_points() -> None:
    fit: Fit = fit_law(planted(BESIROGLU), samples=50)
    assert len(fit.points) == len(fit.residuals) == 56 and len(fit.samples) == 50
