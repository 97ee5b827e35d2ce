"""Speed, waiting, memory, utilisation and losses by source, against clocks and sums of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fledge.core.db import Database
from fledge.core.events import Emitter, Event, curve
from fledge.core.store import home
from fledge.models.shape import ModelShape
from fledge.training.monitoring import matrix_rate as rates
from fledge.training.monitoring.flops import flops_per_token
from fledge.training.monitoring.monitor import Monitor
from fledge.training.objective import as_batch
from fledge.training.objectives.causal_lm import CausalLM
from tests.training.test_statistics import Counted
from tests.training.test_trainer import trainer
from tests.training.toys import VOCAB, Packed, tiny


class Ticking:
    """A clock that we move, and how often it was read."""

    def __init__(self) -> None:
        self.now, self.read = 0.0, 0

    def __call__(self) -> float:
        self.read += 1
        return self.now


def test_tokens_a_second_waiting_and_utilisation_are_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Ticking(), tiny()
    peak = rates.MatrixRate(1e9, "measured")
    monkeypatch.setattr("fledge.training.monitoring.monitor.matrix_rate", lambda device, dtype, events: peak)
    monitor = Monitor(model, "cpu", "float32", world=2, clock=clock)
    with Counted() as operations:
        for step in range(5):
            with monitor.waiting():
                clock.now += 0.25 if step else 100.0  # the first step compiles: it does not count
            clock.now += 0.75
            read = clock.read
            monitor.step(tokens=400, length=16)
            assert clock.read - read <= 1
        reads = clock.read
        found = monitor.metrics()
    assert operations.count == 0, "no operation on a tensor"
    assert reads <= 2 * 5 + 1, "two readings of the clock a step"
    assert found["data_wait"] == pytest.approx(0.25) and monitor.rate == pytest.approx(400.0)
    assert found["mfu"] == pytest.approx(400 * flops_per_token(model, 16) / (2 * 1e9))
    assert found["memory_peak"] >= found["memory"] > 1e7
    clock.now += 1.0
    monitor.step(100, 16)
    assert monitor.metrics()["data_wait"] == 0.0 and monitor.rate == pytest.approx(100.0)
    assert monitor.summary()["matrix_rate_source"] == "measured"


def test_flops_agree_with_the_shape_and_know_what_is_frozen() -> None:
    shape = ModelShape(hidden=32, layers=2, head_dim=8, kv_heads=2, context=64).resolve(VOCAB)
    model = tiny()
    norms = 6 * 2 * 2 * 32  # the shape counts two norms a layer
    assert flops_per_token(model, 16) == shape.training_flops(1, 16) - norms
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    attention = 12 * 2 * 32 * 16
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert flops_per_token(model, 16) == 6 * (matrices - (0 if tied else VOCAB * 32)) + attention
    model.requires_grad_(False)
    assert flops_per_token(model, 16) == 4 * (matrices - (0 if tied else VOCAB * 32)) + attention
    assert flops_per_token(torch.nn.Linear(2, 2), 16) == 0.0


def test_the_matrix_rate_is_measured_once_and_remembered(heard: list[Event], events: Emitter) -> None:
    rates.measure.cache_clear()
    first = rates.matrix_rate("cpu", "float32", events)
    assert first.source == "measured" and 1e8 < first.value < 1e14
    (told,) = [e for e in heard if e.name.startswith("rate/matmul.cpu.float32")]
    assert told.value == first.value and told.step is None
    Database(home() / "fledge.db").add_rate(told.name.removeprefix("rate/"), 5e9)
    heard.clear()
    assert rates.matrix_rate("cpu", "float32", events) == rates.MatrixRate(5e9, "measured") and not heard


@pytest.mark.parametrize(
    ("card", "dtype", "tera", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989, "H100"), ("NVIDIA H100 PCIe", "bfloat16", 756, "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312, "A100"), ("NVIDIA A100-SXM4-40GB", "float32", 19.5, "A100-40GB"),
        ("NVIDIA L40S", "bfloat16", 362, "L40S"), ("NVIDIA L4", "bfloat16", 121, "L4"),
        ("Tesla T4", "float16", 65, "T4"), ("NVIDIA GeForce RTX 4090", "bfloat16", 165, "RTX4090"),
    ],
)  # fmt: skip
def test_a_named_card_has_its_data_sheet(card: str, dtype: str, tera: float, name: str) -> None:
    assert rates.data_sheet(card, dtype) == rates.MatrixRate(pytest.approx(tera * 1e12), f"data sheet of {name}")


def test_a_card_without_a_data_sheet_is_measured_unless_the_user_describes_it() -> None:
    assert rates.data_sheet("NVIDIA A10G", "bfloat16") is None, "not the A10"
    home().mkdir(parents=True, exist_ok=True)
    own = "A10G: {flops: 70e12, bandwidth: 0.6e12, memory: 24e9}"
    (home() / "devices.yaml").write_text(own, encoding="utf-8")
    assert rates.data_sheet("NVIDIA A10G", "bfloat16") == rates.MatrixRate(70e12, "data sheet of A10G")


# --- losses by source ------------------------------------------------------------------------------------------------


class Mixed(Packed):
    """Rows of two sources, the second one with few labels; by row, or by token with a border inside the rows."""

    sources = ("en", "zh")

    def __init__(self, by_token: bool = False, said: bool = True) -> None:
        super().__init__(rows=6, uneven=True)
        self.by_token, self.said = by_token, said

    def origin(self) -> np.ndarray:
        if self.by_token:
            return np.tile(np.arange(self.length) >= 6, (self.rows, 1)).astype(np.int64)
        return np.array([0, 1, 1, 0, 0, 1])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        batch = super().batch(step)
        return batch | {"source": self.origin()} if self.said else batch


def by_hand(model: Any, steps: range, source: Mixed) -> dict[str, float]:
    """Mean loss of each source's target tokens over some batches, in float64."""
    sums = {name: [0.0, 0] for name in source.sources}
    for step in steps:
        batch = as_batch(source.batch(step))
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].double().flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        )
        origin = (
            batch["source"] if batch["source"].ndim == 2 else batch["source"][:, None].expand(batch["labels"].shape)
        )
        kept = (batch["labels"][:, 1:] != -100).flatten()
        for number, name in enumerate(source.sources):
            mine = kept & (origin[:, 1:].flatten() == number)
            sums[name][0] += float(nll[mine].sum())
            sums[name][1] += int(mine.sum())
    return {name: total / count for name, (total, count) in sums.items()}


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_losses_by_source_are_those_of_their_tokens(
    events: Emitter, heard: list[Event], by_token: bool, micro_batch: int
) -> None:
    source, model = Mixed(by_token), tiny()
    trainer(model, events, steps=4, source=source, lr=1e-12, log_every=4, micro_batch=micro_batch).fit()
    with torch.no_grad():
        expected = by_hand(model, range(4), source)
    for name in source.sources:
        assert curve(heard, "test", f"loss/{name}") == {4: pytest.approx(expected[name], rel=1e-5)}
    assert abs(expected["en"] - expected["zh"]) > 3e-4


def test_naming_sources_changes_the_gradient_by_rounding_only(events: Emitter) -> None:
    found = {}
    for said in (False, True):
        model = tiny().train()
        run = trainer(model, events, source=Mixed(said=said), objective=CausalLM(z_loss=1e-3))
        run.steps = 1
        seen: list[torch.Tensor] = []
        model.model.embed_tokens.weight.register_hook(seen.append)
        run.fit()
        found[said] = seen[0]
    assert float((found[True] - found[False]).norm() / found[False].norm()) < 1e-5


RANK = """
import os, sys, json
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from fledge.core.events import Emitter, curve
from fledge.training.layout.ranks import Ranks
from tests.training.test_monitoring import Mixed, Poisoned
from tests.training.test_trainer import trainer
from tests.training.toys import tiny
rank = int(os.environ["RANK"])
ranks = Ranks.join(rank, 2)
heard = []
run = trainer(tiny(), Emitter("x", 0, heard.append), steps=3, source=Mixed(), log_every=3, statistics_every=3)
run.ranks = ranks
run.fit()
model = tiny()
poisoned = trainer(model, Emitter("y", 0, heard.append), steps=3, source=Mixed(said=False), objective=Poisoned(rank))
poisoned.ranks = ranks
skipped = poisoned.fit()["skipped_steps"]
finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
names = ["loss/en", "loss/zh", "grad_norm/00", "update_ratio/01"]
curves = {{name: curve(heard, "x", name) for name in names}}
total = float(sum(p.sum() for p in model.parameters()))
print(json.dumps({{"curves": curves, "skipped": skipped, "finite": finite, "total": total}}))
torch.distributed.destroy_process_group()
"""


class Poisoned(CausalLM):
    """On the second process alone, the second batch is NaN."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.calls = rank, 0

    def loss(self, outputs: Any, batch: Any) -> Any:
        terms = super().loss(outputs, batch)
        self.calls += 1
        if self.rank == 1 and self.calls == 2:
            terms["nll"] = type(terms["nll"])(terms["nll"].sum * float("nan"), terms["nll"].weight)
        return terms


def test_two_processes_measure_what_one_does_and_skip_together(events: Emitter, heard: list[Event]) -> None:
    import json

    code = RANK.format(root=str(Path(__file__).parents[2]))
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(21_000 + os.getpid() % 20_000)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**common, "RANK": str(r), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in (0, 1)
    ]
    trainer(tiny(), events, steps=3, source=Mixed(), log_every=3, statistics_every=3).fit()
    told = [json.loads(process.communicate(timeout=240)[0].splitlines()[-1]) for process in processes]
    for name, points in told[0]["curves"].items():
        assert points == {"3": pytest.approx(curve(heard, "test", name)[3], rel=2e-3)}, name
    assert [one["skipped"] for one in told] == [1, 1] and all(one["finite"] for one in told)
    assert told[0]["total"] == told[1]["total"], "both made the same steps"
