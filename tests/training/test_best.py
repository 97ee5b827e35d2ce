"""Early stopping: the run ends when held-out rows get no better, with the weights that were best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, Event
from fledge.training.checkpoints.best import Best
from fledge.training.likelihood import head_of, hidden_states, shifted, weighted_nll
from fledge.training.objective import as_batch
from fledge.training.trainer import Trainer
from tests.training.test_trainer import Killed, trainer, weights, with_dropout
from tests.training.toys import Packed, settings, tiny


class Few(Packed):
    """The same three rows for ever: what is learned is those rows."""

    def __init__(self, dies_at: int = -1) -> None:
        super().__init__(rows=3)
        self.dies_at = dies_at

    def batch(self, step: int) -> Any:
        if step == self.dies_at:
            raise Killed
        return super().batch(0)


def measuring(model: Any) -> Any:
    """The mean loss on other rows."""
    batch = as_batch(Packed(rows=8, seed=9).batch(0))

    def loss() -> float:
        assert not model.training
        with torch.no_grad():
            total, _ = weighted_nll(hidden_states(model, batch), head_of(model), shifted(batch["labels"]))
        return float(total) / int((shifted(batch["labels"]) >= 0).sum())

    return loss


def run(model: Any, events: Emitter, folder: Path | None = None, dies_at: int = -1, **settings: Any) -> Trainer:
    options = {"steps": 200, "schedule": "constant", "lr": 1e-2, "evaluate_every": 5, "patience": 3, **settings}
    made = trainer(with_dropout(model), events, source=Few(dies_at), folder=folder, **options)
    made.held_out_loss = measuring(model)
    return made


def test_it_stops_with_the_best_weights(tmp_path: Path, events: Emitter, heard: list[Event]) -> None:
    model = tiny()
    metrics = run(model, events, tmp_path / "a").fit()
    measured = {e.step: float(e.value) for e in heard if e.kind == "metric" and e.name == "held_out_loss"}
    best = min(measured, key=lambda step: (measured[step], step))
    assert metrics["best_step"] == best and metrics["best_held_out_loss"] == measured[best]
    assert metrics["steps"] == max(measured) == best + 15 < 200, "three measurements without a better one"
    assert any("over-fits" in str(e.value) for e in heard if e.kind == "message" and e.name == "warning")

    exactly = tiny()
    run(exactly, events, steps=best, patience=0).fit()
    assert weights(model) == weights(exactly)
    held = tiny()
    assert run(held, events).fit()["best_step"] == best and weights(held) == weights(model), "without a folder, too"

    for dies_at in (best - 1, best + 7):
        folder = tmp_path / str(dies_at)
        with pytest.raises(Killed):
            run(tiny(), events, folder, dies_at, checkpoint_every=4).fit()
        resumed = tiny()
        again = run(resumed, events, folder, checkpoint_every=4).fit()
        assert weights(resumed) == weights(model) and again["steps"] == metrics["steps"]


def test_measuring_changes_nothing(events: Emitter) -> None:
    plain, watched = tiny(), tiny()
    run(plain, events, steps=12, evaluate_every=0, patience=0).fit()
    assert "best_step" in run(watched, events, steps=12, patience=0).fit()
    assert weights(plain) == weights(watched)


def test_without_held_out_rows_it_is_refused(events: Emitter) -> None:
    with pytest.raises(FledgeError, match="no held-out rows"):
        trainer(tiny(), events, steps=9, evaluate_every=2).fit()


class Told:
    """What is asked of the saver."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.restored: list[int] = []

    def keep_best(self, step: int) -> None:
        self.kept.append(step)

    def restore_best(self, step: int) -> None:
        self.restored.append(step)


NAN = float("nan")


@pytest.mark.parametrize(
    "losses, min_delta, stops_after, best",
    [
        ([2.0, 2.0, 2.0, 2.0, 2.0], 0.0, 4, 1),  # a flat curve stops
        ([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], 0.0, None, 6),  # an improving one does not
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.0, 4, 1),  # a rising one stops: it is a loss, and lower is better
        ([NAN, 3.0, NAN, 2.0, NAN, NAN, NAN], 0.0, 7, 4),  # what is not a number is never the best
        ([NAN, NAN, NAN, NAN], 0.0, 3, 0),
        ([3.0, float("inf"), 2.0], 0.0, None, 3),
        ([2.0, 1.95, 1.91, 1.9, 1.89], 0.1, 4, 1),  # by no more than min_delta is not better …
        ([2.0, 1.95, 1.89, 1.85, 1.78, 1.75], 0.1, None, 5),  # … than the best, not than the last
        ([2.0, 2.1, 1.9, 2.1, 2.1, 2.1], 0.0, 6, 3),
    ],
)
def test_when_it_stops_and_what_it_takes_for_the_best(
    losses: list[float], min_delta: float, stops_after: int | None, best: int
) -> None:
    """Every curve twice: in one go, and killed and restored after every measurement."""
    for killed in (False, True):
        saver: Any = Told()
        keeper, stopped = Best(settings(evaluate_every=1, patience=3, min_delta=min_delta), {}), None
        for step, loss in enumerate(losses, 1):
            assert keeper.due(step) and not keeper.exhausted
            keeper.measured(step, loss, saver)
            if killed:
                state = json.loads(json.dumps(keeper.state()))
                keeper = Best(settings(evaluate_every=1, patience=3, min_delta=min_delta), state)
            if keeper.exhausted:
                stopped = step
                break
        assert (stopped, keeper.step) == (stops_after, best), killed
        last = stopped or len(losses)
        keeper.restore(last, saver)
        assert saver.restored == ([best] if best and best != last else []), "the best weights come back"
        assert (saver.kept[-1] if saver.kept else 0) == best
