"""The Trainer: sums over global weights, exact resumption, whole checkpoints, steps without a finite gradient."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, Event
from fledge.training.objective import Term, as_batch
from fledge.training.objectives.causal_lm import CausalLM
from fledge.training.optimization.loss_scale import FIRST, GROW_AFTER, LossScale
from fledge.training.trainer import Trainer
from tests.training.toys import Packed, settings, tiny


def trainer(
    model: Any, events: Emitter, steps: int = 6, source: Any = None, folder: Path | None = None, **rest: Any
) -> Trainer:
    options = {name: rest.pop(name) for name in ("micro_batch", "objective") if name in rest}
    objective = options.pop("objective", CausalLM())
    return Trainer(
        objective,
        {"model": model},
        source or Packed(),
        settings(**rest),
        steps,
        7,
        events,
        checkpoints=folder,
        **options,
    )


def weights(model: Any) -> dict[str, bytes]:
    """The bytes of every parameter."""
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


def gradients(model: Any, events: Emitter, micro_batch: int) -> tuple[torch.Tensor, dict[str, float]]:
    run = trainer(model, events, micro_batch=micro_batch)
    measured = run._accumulate(as_batch(Packed(uneven=True).batch(0)), 0)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found, measured


def test_the_gradient_does_not_depend_on_the_micro_batch(events: Emitter) -> None:
    model = tiny().train()
    whole, measured = gradients(model, events, 0)
    batch = as_batch(Packed(uneven=True).batch(0))
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits.double()
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    plain.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    assert measured["loss"] == pytest.approx(float(plain.detach()), rel=1e-6)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-7)
    for size in (1, 2, 4, 5):
        found, again = gradients(model, events, size)
        assert float(found.norm()) == pytest.approx(float(whole.norm()), rel=1e-6)
        assert float((found - whole).norm() / whole.norm()) < 1e-6
        assert again["loss"] == pytest.approx(measured["loss"], rel=1e-6)


def test_several_terms_are_each_divided_by_their_own_weight(events: Emitter) -> None:
    class Two(CausalLM):
        """A term over rows beside the one over tokens, and one that is only measured."""

        def weights(self, batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
            return {**super().weights(batch), "rows": float(len(batch["labels"]))}

        def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, Term]:
            own, (total, _) = self.weights(batch), outputs
            return {
                "nll": Term(total, own["nll"]),
                "rows": Term(total * 2, own["rows"], coefficient=0.5),
                "watched": Term(total.detach() * 0 + 3 * own["rows"], own["rows"], coefficient=0.0),
            }

    model, batch = tiny().train(), as_batch(Packed(uneven=True).batch(0))
    found = {}
    for size in (0, 1, 4):
        measured = trainer(model, events, micro_batch=size, objective=Two())._accumulate(batch, 0)
        found[size] = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        assert measured["watched"] == 3.0
        assert measured["loss"] == pytest.approx(measured["nll"] + 0.5 * measured["rows"])
        tokens = Two().weights(batch)["nll"]
        assert measured["rows"] == pytest.approx(measured["nll"] * tokens * 2 / 6, rel=1e-6)
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-6
    assert float((found[0] - found[4]).norm() / found[0].norm()) < 1e-6


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_and_says_so(events: Emitter, heard: list[Event], optimizer: str) -> None:
    model = tiny()
    metrics = trainer(model, events, steps=40, optimizer=optimizer, lr=1e-2, dtype="bfloat16").fit()
    losses = [e.value for e in heard if e.kind == "metric" and e.name == "loss"]
    assert len(losses) == 40 and losses[0] > 4.0 and losses[-1] < 0.75 * losses[0]
    assert metrics["tokens"] == 40 * 6 * 16 and metrics["steps"] == 40 and metrics["skipped_steps"] == 0
    told = {e.name for e in heard if e.kind == "metric" and e.step is not None}
    assert told == {
        "nll", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "data_wait", "memory", "memory_peak",
        "predicted_seconds",
    }  # fmt: skip
    assert [e.value for e in heard if e.kind == "progress"][-1] == 40
    assert not model.training and all(p.grad is None for p in model.parameters())


class Killed(Exception):
    """The run ends here."""


class KillingSource(Packed):
    """Raises when the batch of one step is asked for."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def batch(self, step: int) -> Any:
        if step == self.at:
            raise Killed
        return super().batch(step)


def with_dropout(model: Any) -> Any:
    """The same model, with randomness in its training steps."""
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_is_uninterrupted_byte_for_byte(tmp_path: Path, events: Emitter, optimizer: str) -> None:
    options: dict[str, Any] = {"steps": 9, "optimizer": optimizer, "checkpoint_every": 2, "dtype": "bfloat16"}
    whole = with_dropout(tiny())
    expected = trainer(whole, events, **options).fit()
    for at in (1, 5, 8):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            trainer(with_dropout(tiny()), events, source=KillingSource(at), folder=folder, **options).fit()
        resumed = with_dropout(tiny())
        metrics = trainer(resumed, events, folder=folder, **options).fit()
        assert weights(resumed) == weights(whole)
        timeless = {"final_loss", "tokens", "steps", "skipped_steps"}
        assert {k: metrics[k] for k in timeless} == {k: expected[k] for k in timeless}


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, events: Emitter, heard: list[Event]) -> None:
    whole = tiny()
    trainer(whole, events, steps=9).fit()
    for what in ("cut", "flipped", "no manifest"):
        folder = tmp_path / what
        with pytest.raises(Killed):
            trainer(tiny(), events, steps=9, source=KillingSource(7), folder=folder, checkpoint_every=2).fit()
        assert sorted(p.name for p in folder.iterdir()) == ["step-00000004", "step-00000006"], "the last two are kept"
        file = folder / "step-00000006" / ("checkpoint.json" if what == "no manifest" else "shard-00000.safetensors")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data if what == "flipped" else data[:-5])
        resumed = tiny()
        heard.clear()
        trainer(resumed, events, steps=9, folder=folder).fit()
        assert weights(resumed) == weights(whole)
        warned = [e.value for e in heard if e.kind == "message" and e.name == "warning"]
        assert warned == ["checkpoint step-00000006 is damaged and was passed over"]
        told = [e.step for e in heard if e.kind == "metric" and e.name == "loss"]
        assert told[0] == 5, "steps 5 and 6 are made again"


def test_an_unfinished_checkpoint_is_no_checkpoint(tmp_path: Path, events: Emitter) -> None:
    with pytest.raises(Killed):
        trainer(tiny(), events, source=KillingSource(5), folder=tmp_path, checkpoint_every=2).fit()
    newest = tmp_path / "step-00000004"
    newest.rename(tmp_path / ".step-00000004.tmp")  # as a kill before the rename leaves it
    model = tiny()
    trainer(model, events, folder=tmp_path, checkpoint_every=2).fit()
    whole = tiny()
    trainer(whole, events).fit()
    assert weights(model) == weights(whole)


class Spoiled(CausalLM):
    """Gives NaN for some of the batches, told by their first token."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.calls, self.bad = -1, bad

    def loss(self, outputs: Any, batch: Any) -> dict[str, Term]:
        self.calls += 1
        total = outputs[0] * (float("nan") if self.calls in self.bad else 1)
        return {"nll": Term(total, self.weights(batch)["nll"])}


def test_a_step_without_a_finite_gradient_is_skipped(events: Emitter, heard: list[Event]) -> None:
    model = tiny()
    metrics = trainer(model, events, objective=Spoiled({2, 4})).fit()
    assert metrics["skipped_steps"] == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert metrics["final_loss"] == metrics["final_loss"]
    with pytest.raises(FledgeError, match="diverged"):
        trainer(tiny(), events, steps=20, objective=Spoiled(set(range(3, 20)))).fit()


STEPS = 300
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from fledge.core.events import Emitter
from tests.training.test_trainer import STEPS, trainer
from tests.training.toys import tiny
def say(event):
    if event.kind == "progress":
        print(event.value, flush=True)
trainer(tiny(), Emitter("x", 0, say), STEPS, folder=Path(sys.argv[1]), checkpoint_every=int(sys.argv[2])).fit()
"""


def child(folder: Path, every: int) -> subprocess.Popen[str]:
    code = CHILD.format(root=str(Path(__file__).parents[2]))
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(every)], stdout=subprocess.PIPE, text=True)


def kill_after(process: subprocess.Popen[str], step: float, number: int) -> int:
    """Send a signal once the child has said that it passed `step`."""
    assert process.stdout is not None
    for line in process.stdout:
        if float(line) >= step:
            process.send_signal(number)
            break
    process.stdout.read()
    return process.wait(timeout=30)


def test_killed_and_told_to_stop_in_real_processes(tmp_path: Path, events: Emitter) -> None:
    assert kill_after(child(tmp_path, 3), 7, signal.SIGKILL) == -signal.SIGKILL
    began = time.monotonic()
    assert kill_after(child(tmp_path, 1000), 15, signal.SIGTERM) == 143
    assert time.monotonic() - began < 30
    stopped = json.loads((max(tmp_path.glob("step-*")) / "checkpoint.json").read_text())["step"]
    assert 15 <= stopped < STEPS, "SIGTERM leaves a checkpoint of the step in hand"
    whole, resumed = tiny(), tiny()
    trainer(whole, events, STEPS).fit()
    trainer(resumed, events, STEPS, folder=tmp_path).fit()
    assert weights(resumed) == weights(whole)


RANK = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors.torch import save_file
from fledge.core.events import Emitter
from fledge.training.layout.ranks import Ranks
from tests.training.test_trainer import trainer
from tests.training.toys import Packed, tiny
import os
rank = int(os.environ["RANK"])
heard = []
model = tiny()
run = trainer(model, Emitter("x", 0, heard.append), steps=4, source=Packed(rows=5, uneven=True))
run.ranks = Ranks.join(rank, 2)
metrics = run.fit()
save_file({{n: p.detach() for n, p in model.named_parameters()}}, Path(sys.argv[1]) / f"rank{{rank}}.safetensors")
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_result_of_one(tmp_path: Path, events: Emitter) -> None:
    from safetensors.torch import load_file

    code = RANK.format(root=str(Path(__file__).parents[2]))
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + os.getpid() % 20_000),
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env={**common, "RANK": str(rank)})
        for rank in (0, 1)
    ]
    model = tiny()
    trainer(model, events, steps=4, source=Packed(rows=5, uneven=True)).fit()
    assert [p.wait(timeout=60) for p in processes] == [0, 0]
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-3, atol=1e-5)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_long_peace() -> None:
    scale = LossScale("float16")
    assert scale.value == FIRST
    assert scale.update(finite=False) and scale.value == FIRST / 2
    for _ in range(GROW_AFTER - 1):
        assert not scale.update(finite=True)
    assert scale.value == FIRST / 2
    scale.update(finite=True)
    assert scale.value == FIRST
    again = LossScale("float16", **{"value": scale.state()["loss_scale"], "whole_steps": 3})
    assert (again.value, again.whole_steps) == (FIRST, 3)
    small = LossScale("float16", 1.0)
    assert not small.update(finite=False), "below the smallest scale it is no matter of the format"
    full = LossScale("float32")
    assert full.value == 1 and not full.update(finite=False) and full.value == 1
    gradient = torch.tensor([FIRST, 2 * FIRST])
    scale.unscale([gradient])
    assert gradient.tolist() == [1, 2]


def test_fp16_learns_as_fp32_does_and_an_overflow_costs_one_step(events: Emitter) -> None:
    losses = {}
    for dtype in ("float32", "float16"):
        model = tiny()
        losses[dtype] = trainer(model, events, steps=12, dtype=dtype).fit()["final_loss"]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=2e-3)

    class Overflows(CausalLM):
        """The third batch's gradient is too large for fp16, and its loss is not."""

        calls = 0

        def loss(self, outputs: Any, batch: Any) -> dict[str, Term]:
            self.calls += 1
            term = super().loss(outputs, batch)["nll"]
            by = 1e6 if self.calls == 3 else 1.0
            return {"nll": Term(term.sum * by - (term.sum * (by - 1)).detach(), term.weight)}

    run = trainer(tiny(), events, steps=12, dtype="float16", objective=Overflows())
    assert run.fit()["skipped_steps"] == 0, "what the format overflows is not counted against the run"


def test_adafactor_learns_and_resumes(events: Emitter, tmp_path: Path) -> None:
    whole = tiny()
    first = trainer(whole, events, steps=8, optimizer="adafactor", lr=1e-2, folder=tmp_path / "a")
    assert first.fit()["final_loss"] < 4.1
    model = tiny()
    half = trainer(model, events, steps=8, optimizer="adafactor", lr=1e-2, folder=tmp_path / "b", checkpoint_every=3)
    half.fit()
    resumed = tiny()
    trainer(resumed, events, steps=8, optimizer="adafactor", lr=1e-2, folder=tmp_path / "b", checkpoint_every=3).fit()
    assert weights(resumed) == weights(whole)


def test_activation_checkpointing_changes_no_bit_and_keeps_less(events: Emitter) -> None:
    """With dropout, whose draws must come out the same the second time."""
    kept: dict[bool, int] = {}
    found = {}
    for again in (False, True):
        model = with_dropout(tiny(layers=6))
        run = trainer(model, events, steps=3, source=Packed(rows=8))
        run.activation_checkpointing = again
        run.fit()
        found[again] = weights(model)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run.objective.forward({"model": model.train()}, as_batch(Packed(rows=8).batch(0)))
        kept[again] = sum(sizes.values())
    assert found[True] == found[False]
    assert kept[True] < 0.5 * kept[False]
