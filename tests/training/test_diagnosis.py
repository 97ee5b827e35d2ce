"""Every symptom provoked in a real run, named early and once; where the remedy is a switch, it is thrown and the
symptom is gone."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, Event
from fledge.data.tokens.rows import Prefetched
from fledge.training.objective import Batch, Term
from fledge.training.objectives.causal_lm import CausalLM
from fledge.training.stability.diagnosis import FEWEST, LOOKS, STEPS, out_of_memory, symptoms
from tests.training.test_trainer import trainer
from tests.training.toys import VOCAB, Packed, tiny

STEADY = {"schedule": "constant"}


class Multiplied(CausalLM):
    """The loss times a number."""

    def __init__(self, by: float = 1.0, seconds: float = 0.0) -> None:
        super().__init__()
        self.by, self.seconds = by, seconds

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        time.sleep(self.seconds)
        term = super().loss(outputs, batch)["nll"]
        return {"nll": Term(term.sum * self.by, term.weight)}


class Narrow(Packed):
    """Rows of which only the first tokens are kept, and what is to be learned stands behind the tenth."""

    def __init__(self, kept: int) -> None:
        super().__init__(rows=2)
        self.kept = kept

    def batch(self, step: int) -> dict[str, np.ndarray]:
        batch = super().batch(step)
        batch["labels"][:, :10] = -100
        return {name: values[:, : self.kept] for name, values in batch.items()}


class Same(Packed):
    """One batch, over and over: its loss is exactly where it was."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        return super().batch(0)


class Slow(Packed):
    """Batches that take their time."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        time.sleep(0.02)
        return super().batch(step)


def said(heard: list[Event]) -> list[str]:
    return [str(e.value) for e in heard if e.kind == "message" and e.name == "warning"]


def warned(heard: list[Event], events: Emitter, model: Any = None, steps: int = FEWEST, **options: Any) -> list[str]:
    """What is said about a run."""
    heard.clear()
    options.setdefault("source", Packed(rows=2))
    trainer(model or tiny(), events, steps=steps, **options).fit()
    return said(heard)


# symptom: (how it is provoked, what is said, the switch that cures it or None)
SYMPTOMS: dict[str, tuple[dict[str, Any], str, dict[str, Any] | None]] = {
    "rate too high": (
        {"lr": 2.0, "grad_clip": 0.0, "warmup": FEWEST, **STEADY},
        "lower the learning rate (2) or lengthen the warm-up",
        {"lr": 3e-3},
    ),
    "rate too low": ({"lr": 1e-9, "source": Same(rows=1), **STEADY}, "raise the learning rate (1e-09)", {"lr": 1e-2}),
    "clipped": ({"objective": Multiplied(200.0), "lr": 1e-3}, "times what it is clipped to", {"grad_clip": 1000.0}),
    "vanishing": ({"objective": Multiplied(1e-12)}, "nothing reaches the weights", {"objective": Multiplied(1.0)}),
    "underflow of fp16": (
        {"objective": Multiplied(1e-12), "dtype": "float16", "steps": LOOKS[0]},
        "100 % of the gradients are zero in fp16, too small for it: set dtype to bfloat16",
        {"dtype": "bfloat16"},
    ),
    "overflow of fp16": (
        {"objective": Multiplied(1e5), "dtype": "float16", "steps": 20, "grad_clip": 0.0},
        "overflow fp16 even with a loss scale of 8",
        {"dtype": "bfloat16"},
    ),
    "all labels ignored": (
        {"source": Narrow(kept=8), "steps": 4},
        "3 steps in a row had nothing to learn, all labels are ignored: raise max_length (512)",
        {"source": Narrow(kept=16)},
    ),
}


@pytest.mark.parametrize("symptom", list(SYMPTOMS))
def test_a_symptom_is_named_once_and_its_remedy_cures_it(symptom: str, events: Emitter, heard: list[Event]) -> None:
    provoked, words, remedy = SYMPTOMS[symptom]
    found = warned(heard, events, **provoked)
    assert sum(words in warning for warning in found) == 1, found
    if remedy is not None:
        cured = warned(heard, events, **{**provoked, **remedy})
        assert not any(words in warning for warning in cured), cured


def test_it_can_be_silenced(events: Emitter, heard: list[Event]) -> None:
    provoked, words, _ = SYMPTOMS["all labels ignored"]
    assert any(words in warning for warning in warned(heard, events, **provoked))
    assert warned(heard, events, **provoked, diagnose="off") == []


def test_a_sound_run_is_told_nothing(events: Emitter, heard: list[Event]) -> None:
    assert warned(heard, events, statistics_every=25) == []
    assert list(symptoms([1.0] * (STEPS - 1), [1.0] * (STEPS - 1), 1e-3, 1.0)) == []


def test_gradients_that_explode(events: Emitter, heard: list[Event]) -> None:
    """Weights that are pushed out ever faster, since nothing clips and the rate is far too high."""
    wild = {"lr": 8.0, "grad_clip": 0.0, "warmup": FEWEST, **STEADY}
    found = warned(heard, events, **wild)
    assert sum("the gradient norm has grown from" in warning for warning in found) == 1, found
    assert warned(heard, events, **{**wild, "lr": 3e-3, "grad_clip": 1.0}) == []


def test_training_that_waits_for_its_data(events: Emitter, heard: list[Event]) -> None:
    steps, objective = LOOKS[0] + 4, Multiplied(1.0, seconds=0.03)
    found = warned(heard, events, steps=steps, source=Slow(rows=2), objective=objective)
    assert sum("goes into waiting for batches" in warning for warning in found) == 1, found
    shares = [e.value for e in heard if e.kind == "metric" and e.name == "data_wait"][1:]
    assert all(0.1 < share < 0.9 for share in shares)
    with Prefetched(Slow(rows=2)) as ahead:
        assert warned(heard, events, steps=steps, source=ahead, objective=objective) == []


def relu_model(bias: float) -> Any:
    """A GPT-2 with ReLU whose first layer's units start at `bias`: far below zero they never fire again."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=2, activation_function="relu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    nn.init.constant_(model.transformer.h[0].mlp.c_fc.bias, bias)
    return model


def test_layers_whose_units_are_dead(events: Emitter, heard: list[Event]) -> None:
    found = warned(heard, events, relu_model(-9.0), steps=LOOKS[0])
    assert sum("100 % of the units of layer 00 are zero for every token (1 such layers)" in w for w in found) == 1, (
        found
    )
    assert warned(heard, events, relu_model(0.0), steps=LOOKS[0]) == []


def test_a_layer_that_no_gradient_reaches(events: Emitter, heard: list[Event]) -> None:
    model = tiny()
    model.model.layers[0].register_forward_hook(lambda m, a, out: out.detach())
    found = warned(heard, events, model, steps=LOOKS[0])
    assert [
        w for w in found if "no gradient reaches embeddings, 00: look for a part between them and the loss" in w
    ] == found


class Cycle:
    """Rows that count upwards by `stride`; a few of them, again and again, or always new ones."""

    def __init__(self, stride: int, few: int = 0) -> None:
        self.stride, self.few = stride, few

    def batch(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.stride, step % self.few if self.few else step])
        start, noise = rng.integers(0, VOCAB, (4, 1)), rng.integers(0, VOCAB, (4, 16))
        ids = (start + self.stride * np.arange(16)) % VOCAB
        ids = np.where(rng.random((4, 16)) < 0.3, noise, ids)
        return {"input_ids": ids, "labels": ids.copy()}


def held_out(model: Any, source: Cycle, first: int = 10_000) -> Any:
    """The loss on rows that the training does not see."""

    def measure() -> float:
        losses = []
        with torch.no_grad():
            for step in range(first, first + 4):
                ids = torch.as_tensor(source.batch(step)["input_ids"])
                losses.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss))
        return sum(losses) / len(losses)

    return measure


def tuned(model: Any, events: Emitter, source: Any, measured: Cycle, **options: Any) -> dict[str, Any]:
    run = trainer(model, events, source=source, evaluate_every=5, lr=1e-2, **{"steps": 80, **options})
    run.held_out_loss = held_out(model, measured)
    return run.fit()


def test_over_fitting_and_the_patience_that_stops_it(events: Emitter, heard: list[Event]) -> None:
    words = "the model over-fits; keep the best weights (patience)"
    metrics = tuned(tiny(), events, Cycle(3, few=4), Cycle(3))
    assert sum(words in warning for warning in said(heard)) == 1, said(heard)
    heard.clear()
    model = tiny()
    stopped = tuned(model, events, Cycle(3, few=4), Cycle(3), patience=1)
    assert not any(words in warning for warning in said(heard))
    assert stopped["steps"] < metrics["steps"]
    assert held_out(model, Cycle(3))() == pytest.approx(stopped["best_held_out_loss"], rel=1e-5)


class Both:
    """Rows of two sources by turns."""

    def __init__(self, *parts: Cycle) -> None:
        self.parts = parts

    def batch(self, step: int) -> dict[str, np.ndarray]:
        halves = [part.batch(step) for part in self.parts]
        return {name: np.concatenate([half[name][:2] for half in halves]) for name in halves[0]}


def test_forgetting_and_the_replay_that_stops_it(events: Emitter, heard: list[Event]) -> None:
    def learned() -> Any:
        model = tiny()
        trainer(model, events, steps=120, source=Cycle(1), lr=1e-2, diagnose="off").fit()
        return model

    knows = learned()
    state = {name: value.clone() for name, value in knows.state_dict().items()}
    words = "has only risen"
    heard.clear()
    tuned(knows, events, Cycle(5), Cycle(1), steps=60)
    assert sum(words in warning for warning in said(heard)) == 1, said(heard)
    assert "mix earlier data in" in said(heard)[0]
    heard.clear()
    knows.load_state_dict(state)
    tuned(knows, events, Both(Cycle(5), Cycle(1)), Cycle(1), steps=60)
    assert not any(words in warning for warning in said(heard)), said(heard)


class Large(CausalLM):
    """Asks for more memory than there is where it gets more than `rows` rows at once."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, models: Any, batch: Batch) -> Any:
        torch.empty(2**50 if len(batch["input_ids"]) > self.rows else 1)
        return super().forward(models, batch)


def test_a_step_that_does_not_fit_says_how_to_make_it_fit(events: Emitter) -> None:
    with pytest.raises(FledgeError, match="does not fit into memory") as caught:
        trainer(tiny(), events, objective=Large(3)).fit()
    (problem,) = caught.value.problems
    order = ["--micro-batch 3", "--activation-checkpointing on", "shorten the rows", "train an adapter"]
    assert [problem.fix.index(way) for way in order] == sorted(problem.fix.index(way) for way in order)
    estimate = problem.fix.partition("by the estimate: ")[2]
    assert estimate.startswith("execution.micro_batch: 3 (") and " instead of " in estimate, problem.fix
    assert trainer(tiny(), events, objective=Large(3), micro_batch=3).fit()["steps"] == 6
    assert out_of_memory(RuntimeError("shapes do not match"), 4) is None


def test_the_words_are_there_in_chinese(events: Emitter, heard: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_LANG", "zh")
    (found,) = warned(heard, events, source=Narrow(kept=8), steps=4)
    assert "连续 3 步没有可学的内容" in found
