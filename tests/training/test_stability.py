"""Runs that go wrong: steps left out, the way back, and what is said about it, each provoked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, Event
from fledge.training.objective import Batch, Term
from fledge.training.objectives.causal_lm import CausalLM
from fledge.training.stability.diagnosis import worse_on_held_out
from tests.training.test_trainer import Killed, KillingSource, trainer, weights
from tests.training.toys import Packed, tiny


class Marked(Packed):
    """Batches whose loss is multiplied by a number of their own; `order` says which batch comes at which step."""

    def __init__(self, factors: dict[int, float], order: Any = int, dies_at: int = -1) -> None:
        super().__init__(rows=2)
        self.factors, self.order, self.dies_at = factors, order, dies_at

    def batch(self, step: int) -> dict[str, np.ndarray]:
        number = self.order(step)
        if number == self.dies_at:
            raise Killed
        batch = super().batch(number)
        return batch | {"factor": np.full(self.rows, self.factors.get(number, 1.0))}


class Multiplied(CausalLM):
    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.by = by

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        term = super().loss(outputs, batch)["nll"]
        factor = batch["factor"][0].float() if "factor" in batch else 1.0
        return {"nll": Term(term.sum * self.by * factor, term.weight)}


POISON = dict.fromkeys(range(14, 19), float("nan"))


def warnings(heard: list[Event]) -> list[str]:
    return [str(e.value) for e in heard if e.kind == "message" and e.name == "warning"]


def test_a_run_gone_astray_returns_and_goes_on_with_other_batches(
    tmp_path: Path, events: Emitter, heard: list[Event]
) -> None:
    model = tiny()
    source = Marked(POISON)
    options: dict[str, Any] = {"steps": 30, "checkpoint_every": 10, "objective": Multiplied()}
    metrics = trainer(model, events, source=source, folder=tmp_path / "a", **options).fit()
    assert (metrics["rollbacks"], metrics["skipped_steps"]) == (1, 5)
    assert "the run has gone astray at step 19: back to step 10, with other batches" in warnings(heard)

    known = tiny()  # the same batches in the order in which they were of use
    trainer(known, events, source=Marked({}, lambda step: step if step < 10 else step + 9), **options).fit()
    assert weights(model) == weights(known)

    for dies_at in (16, 19, 25):
        folder = tmp_path / str(dies_at)
        with pytest.raises(Killed):
            trainer(tiny(), events, source=Marked(POISON, dies_at=dies_at), folder=folder, **options).fit()
        resumed = tiny()
        again = trainer(resumed, events, source=source, folder=folder, **options).fit()
        assert weights(resumed) == weights(model) and again["rollbacks"] == 1


def test_it_returns_farther_and_then_gives_up(tmp_path: Path, events: Emitter, heard: list[Event]) -> None:
    source = Marked(dict.fromkeys(range(14, 99), float("nan")))
    options: dict[str, Any] = {"steps": 30, "checkpoint_every": 10, "objective": Multiplied()}
    with pytest.raises(FledgeError, match=r"diverged: 5 steps in a row[^\n]*\n.*lower the learning rate"):
        trainer(tiny(), events, source=source, folder=tmp_path, **options).fit()
    returns = [w for w in warnings(heard) if "astray" in w]
    assert [w.split("back to step ")[1].split(",")[0] for w in returns] == ["10", "0"]
    with pytest.raises(FledgeError, match="diverged"):
        trainer(tiny(), events, source=source, folder=tmp_path / "never", rollbacks=0, **options).fit()


def test_a_spike_is_left_out_where_the_recipe_asks_for_it(events: Emitter, heard: list[Event]) -> None:
    source = Marked({50: 40.0})
    for sigmas, left_out in ((6.0, 1), (0.0, 0)):
        heard.clear()
        run = trainer(tiny(), events, steps=60, source=source, objective=Multiplied(), spike_sigmas=sigmas)
        assert run.fit()["skipped_steps"] == left_out
        assert ("step 51 jumped out of the recent ones and was left out" in warnings(heard)) == bool(left_out)


def test_rising_loss_on_held_out_rows_is_said() -> None:
    assert worse_on_held_out(2.0, 1.9, 0.1) == ""
    assert "2.000 to 2.300" in worse_on_held_out(2.0, 2.3, 0.1)


class Steep(CausalLM):
    """The loss of one batch as it is, its gradient many times as steep."""

    def __init__(self, at: int, by: float) -> None:
        super().__init__()
        self.at, self.by, self.calls = at, by, -1

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        self.calls += 1
        term = super().loss(outputs, batch)["nll"]
        by = self.by if self.calls == self.at else 1.0
        return {"nll": Term(term.sum * by - (term.sum * (by - 1)).detach(), term.weight)}


def test_a_jump_of_the_gradient_alone_is_clipped_or_left_out(events: Emitter, heard: list[Event]) -> None:
    """The loss shows nothing; clipping bounds the step to the length of one, `spike_sigmas` leaves it out."""
    model = tiny()
    run = trainer(model, events, steps=41, objective=Steep(40, 1e4), source=Packed(rows=2), grad_clip=0.5)
    clipped: list[float] = []
    original = torch._foreach_mul_

    def listened(gradients: Any, factor: float) -> Any:
        found = original(gradients, factor)
        clipped.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_mul_", listened)
        metrics = run.fit()
    norms = [float(e.value) for e in heard if e.kind == "metric" and e.name == "grad_norm"]
    assert norms[-1] > 1e3 * norms[-2] and metrics["skipped_steps"] == 0
    assert clipped[-1] == pytest.approx(0.5, rel=1e-3)
    assert all(torch.isfinite(p).all() for p in model.parameters())

    heard.clear()
    run = trainer(tiny(), events, steps=42, objective=Steep(40, 1e4), source=Packed(rows=2), spike_sigmas=6)
    assert run.fit()["skipped_steps"] == 1
    assert "step 41 jumped out of the recent ones and was left out" in warnings(heard)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_found_before_the_first_step(events: Emitter, value: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(FledgeError, match="not all finite") as caught:
        trainer(model, events).fit()
    assert "1 of 20 parameters: model.model.layers.1.mlp.up_proj.weight" in str(caught.value)


def test_a_checkpoint_whose_weights_have_overflowed_is_refused(tmp_path: Path, events: Emitter) -> None:
    """A rate so absurd that the first step leaves the range of fp32; killed behind the checkpoint of that step."""
    absurd: dict[str, Any] = {"lr": 1e39, "warmup": 1, "folder": tmp_path, "checkpoint_every": 1, "rollbacks": 0}
    with pytest.raises(Killed):
        trainer(tiny(), events, source=KillingSource(2), **absurd).fit()
    with pytest.raises(FledgeError, match="not all finite"):
        trainer(tiny(), events, **absurd).fit()


def test_fp16_overflow_is_told_from_real_trouble(events: Emitter, heard: list[Event]) -> None:
    """A gradient that overflows halves the scale and costs the run nothing; a loss that is NaN counts, and does not."""
    run = trainer(tiny(), events, steps=12, dtype="float16", objective=Steep(4, 1e6))
    assert run.fit()["skipped_steps"] == 0 and warnings(heard) == []
    scales = [e.value for e in heard if e.kind == "metric" and e.name == "loss_scale"]
    assert scales == [2.0**16] * 4 + [2.0**15] * 8

    heard.clear()
    source = Marked({4: float("nan"), 5: float("inf")})
    run = trainer(tiny(), events, steps=12, dtype="float16", objective=Multiplied(), source=source)
    assert run.fit()["skipped_steps"] == 2
    assert {e.value for e in heard if e.kind == "metric" and e.name == "loss_scale"} == {2.0**16}
    assert "step 5 had no finite gradient and was skipped" in warnings(heard)
