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
from fledge.training.stability.diagnosis import STEPS, out_of_memory, symptoms, worse_on_held_out
from tests.training.test_trainer import Killed, trainer, weights
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


@pytest.mark.parametrize(
    ("said", "settings", "by"),
    [
        ("raise the learning rate (1e-09)", {"lr": 1e-9}, 1.0),
        ("nothing reaches the weights", {"lr": 1e-9}, 1e-9),
        ("lower the learning rate (0.5) or lengthen the warm-up", {"lr": 0.5, "grad_clip": 0.0, "warmup": 200}, 1.0),
        ("times what it is clipped to", {"lr": 1e-3}, 200.0),
    ],
)
def test_symptoms_are_named_early_and_once(
    events: Emitter, heard: list[Event], said: str, settings: dict[str, Any], by: float
) -> None:
    trainer(tiny(), events, steps=2 * STEPS, schedule="constant", objective=Multiplied(by), **settings).fit()
    assert sum(said in warning for warning in warnings(heard)) == 1, warnings(heard)


def test_a_sound_run_is_told_nothing(events: Emitter, heard: list[Event]) -> None:
    trainer(tiny(), events, steps=2 * STEPS).fit()
    assert warnings(heard) == []
    assert list(symptoms([1.0] * (STEPS - 1), [1.0] * (STEPS - 1), 1e-3, 1.0)) == []


def test_rising_loss_on_held_out_rows_is_said() -> None:
    assert worse_on_held_out(2.0, 1.9, 0.1) == ""
    assert "2.000 to 2.300" in worse_on_held_out(2.0, 2.3, 0.1)


class Huge(CausalLM):
    """Asks for more memory than there is."""

    def forward(self, models: Any, batch: Batch) -> Any:
        torch.empty(2**50)
        return super().forward(models, batch)


def test_a_step_that_does_not_fit_says_how_to_make_it_fit(events: Emitter) -> None:
    with pytest.raises(FledgeError, match="does not fit into memory") as caught:
        trainer(tiny(), events, objective=Huge()).fit()
    assert "--micro-batch 3" in str(caught.value)
    assert out_of_memory(RuntimeError("shapes do not match"), 4) is None
