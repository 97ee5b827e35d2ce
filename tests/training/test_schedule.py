"""Schedules and optimisers: pure functions of the step, guarded at both ends; what is decayed and what is not."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fledge.core.errors import FledgeError
from fledge.training.optimization.optimizer import build_optimizers, clip, freeze, lr_shares, set_lr
from fledge.training.optimization.schedule import lr_factor
from tests.training.toys import settings, tiny


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 40, 90, 0.03, 0.5])
def test_every_schedule_stays_between_its_ends(schedule: str, warmup: float) -> None:
    chosen = settings(schedule=schedule, warmup=warmup, min_lr_ratio=0.1)
    factors = [lr_factor(step, 40, chosen) for step in range(60)]
    assert all(0.0 < factor <= 1.0 for factor in factors), "no step is lost, none is above the peak"
    peak = factors.index(max(factors))
    assert all(b >= a for a, b in pairwise(factors[: peak + 1]))
    assert all(b <= a for a, b in pairwise(factors[peak:])), "never rising past the peak"
    if schedule != "constant" and warmup < 40:
        assert factors[39] == factors[59] == pytest.approx(0.1)


def test_values_by_hand() -> None:
    linear = settings(schedule="linear", warmup=4)
    assert [lr_factor(s, 8, linear) for s in range(8)] == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = settings(schedule="cosine", warmup=0, min_lr_ratio=0.2)
    assert lr_factor(4, 10, cosine) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    wsd = settings(schedule="wsd", warmup=0)
    assert [lr_factor(s, 10, wsd) for s in (0, 6, 7, 8, 9)] == [1.0, 1.0, 1.0, 0.5, 0.0]
    assert lr_factor(0, 1, settings(schedule="constant", warmup=0.03)) == 1.0
    root = settings(schedule="inverse_sqrt", warmup=4, min_lr_ratio=0.25)
    assert [lr_factor(s, 100, root) for s in (3, 15, 35, 99)] == [1.0, 0.5, 1 / 3, 0.25]


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_only_inner_matrices_are_decayed(name: str) -> None:
    model = tiny()
    optimizers = build_optimizers([model], settings(optimizer=name, weight_decay=0.1))
    decayed = {
        id(p) for o in optimizers for group in o.param_groups for p in group["params"] if group["weight_decay"] > 0
    }
    names = {key for key, p in model.named_parameters() if id(p) in decayed}
    assert names == {key for key, p in model.named_parameters() if p.ndim == 2 and "embed" not in key}
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters()), "every parameter once"
    assert isinstance(optimizers[0], torch.optim.Muon) == (name == "muon")


def test_rates_follow_the_factor_and_the_peaks() -> None:
    optimizers = build_optimizers([tiny()], settings(optimizer="muon", lr=0.004, muon_lr=0.02))
    assert set_lr(optimizers, 0.5) == 0.002
    assert [group["lr"] for o in optimizers for group in o.param_groups] == [0.01, 0.002]


def test_clip_reports_the_norm_before_and_bounds_it_after() -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip(parameters, 0.0) == pytest.approx(5.0)
    assert clip(parameters, 1.0) == pytest.approx(5.0)
    assert clip(parameters, 1.0) == pytest.approx(1.0)
    assert clip([parameters[2]], 1.0) == 0.0


def test_layers_learn_the_more_slowly_the_lower_they_stand() -> None:
    model = tiny(layers=3)
    shares = lr_shares(model, 0.5)
    assert shares["model.norm.weight"] == 1
    assert shares["model.layers.2.mlp.up_proj.weight"] == 0.5
    assert shares["model.layers.0.input_layernorm.weight"] == 0.125
    assert shares["model.embed_tokens.weight"] == 0.0625
    for name in ("adamw", "muon"):
        optimizers = build_optimizers([model], settings(optimizer=name, layer_lr_decay=0.5, lr=0.01, muon_lr=0.02))
        assert set_lr(optimizers, 0.5) == 0.005
        peak = {id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
        for key, parameter in model.named_parameters():
            inner = name == "muon" and parameter.ndim == 2 and "embed" not in key
            assert peak[id(parameter)] == pytest.approx(0.5 * (0.02 if inner else 0.01) * shares[key])


def test_frozen_parts_stay_and_a_pattern_that_matches_nothing_is_refused() -> None:
    model = tiny(layers=3)
    freeze(model, ["model.embed_tokens*", "*.layers.0.*"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any("embed" in name or ".layers.0." in name for name in trained)
    held = [p for o in build_optimizers([model], settings()) for group in o.param_groups for p in group["params"]]
    assert len(held) == len(trained)
    with pytest.raises(FledgeError, match=r"no parameter has such a name[\s\S]*model.layer.0"):
        freeze(model, ["model.layer.0.*"])
    with pytest.raises(FledgeError, match="nothing is left to train"):
        freeze(model, ["*"])
