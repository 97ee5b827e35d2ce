"""Every layout on four processes gives the losses, gradient norms and weights of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fledge.training.layout.ranks import Ranks
from tests.training.layouts import STAGES, Case, inputs, stage, train, weights_of

HELD = {"l2_sp": 0.3, "unfreeze": {"every": 1, "layers": 2}}
FSDP_TP = {"tensor": 2, "replicate": 1, "shard": 2}
CASES = {
    "ddp": Case("ddp", micro_batch=1),
    "zero1": Case("zero1", tied=True, micro_batch=1),
    "zero2": Case("zero2", "qwen2", micro_batch=1),
    "zero3": Case("zero3", "gpt2", tied=True, micro_batch=2),
    "hsdp": Case("hsdp", "mistral", z_loss=1e-3, checkpointing=True),
    "tp2-ddp": Case({"tensor": 2}, "qwen2", tied=True, micro_batch=2),
    "tp4": Case({"tensor": 4}, z_loss=1e-3, vocab=63, sources=("en", "zh")),
    "tp2-gpt2": Case({"tensor": 2}, "gpt2", tied=True, vocab=61, checkpointing=True),
    "fsdp-tp": Case(FSDP_TP, "qwen3", tied=True, micro_batch=2, vocab=63),
    "fsdp-tp-gpt2": Case(FSDP_TP, "gpt2"),
    "pp4": Case({"pipeline": 4}, tied=True, layers=4),
    "pp2-ddp": Case({"pipeline": 2}, "gpt2", tied=True, micro_batch=1),
    "pp2-gpipe": Case({"pipeline": 2, "schedule": "gpipe"}, "qwen2", checkpointing=True),
    "pp2-interleaved": Case({"pipeline": 2, "schedule": "interleaved"}, "qwen3", tied=True, layers=5),
    "pp2-zero-bubble": Case({"pipeline": 2, "schedule": "zero_bubble"}, "mistral", layers=4),
    "pp-fsdp": Case({"pipeline": 2, "replicate": 1, "shard": 2}, tied=True, micro_batch=1),
    "pp-tp": Case({"pipeline": 2, "tensor": 2}, "qwen2", tied=True),
    "lora-fsdp": Case("zero3", "qwen2", lora=True, micro_batch=1),
    "lora-tp": Case({"tensor": 2}, "qwen3", lora=True, tied=True),
    "lora-tp-gpt2": Case({"tensor": 2}, "gpt2", lora=True),
    "lora-pp": Case({"pipeline": 2}, lora=True),
    "dpo-fsdp-tp": Case(FSDP_TP, objective="dpo"),
    "muon-zero3": Case("zero3", settings={"optimizer": "muon"}, rounding=100),
    "pp2-bf16": Case({"pipeline": 2}, settings={"dtype": "bfloat16"}, rounding=100),
    "few-rows": Case("zero3", rows=2),
    "pp2-resumed": Case({"pipeline": 2, "schedule": "interleaved"}, tied=True, layers=4, resumed=True),
    "ctx2": Case({"context": 2}, "qwen2", tied=True, micro_batch=1, sources=("en", "zh")),
    "ctx2-shard2": Case({"context": 2, "replicate": 1, "shard": 2}, "qwen3", z_loss=1e-3, micro_batch=2, length=21),
    "ctx2-zero1": Case({"context": 2, "zero": 1}, "gpt2", micro_batch=1, padded=True, checkpointing=True),
    "ctx2-window": Case({"context": 2}, "mistral", window=3, length=30),
    "ctx4": Case({"context": 4}, tied=True, micro_batch=4, length=29),
    "ctx4-window": Case({"context": 4, "zero": 2}, "mistral", window=9, micro_batch=2, length=32),
    "ctx4-lora": Case({"context": 4}, "qwen2", lora=True, padded=True, length=23),
    "ctx2-few-rows": Case({"context": 2, "replicate": 1, "shard": 2}, rows=1),
    "ctx4-resumed": Case({"context": 4}, "gpt2", tied=True, resumed=True),
    "fsdp-tp-resumed": Case(FSDP_TP, "gpt2", tied=True, vocab=63, resumed=True),
}


def run_group(folder: Path, names: list[str], world: int = 4) -> None:
    """All cases in one group of processes."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}:{root}"}
    command = [sys.executable, "-m", "tests.training.layouts"]
    logs = [(folder / f"log-{rank}.txt").open("wb") for rank in range(world)]
    processes = [
        subprocess.Popen([*command, str(rank), str(world), str(folder), *names], env=environment, cwd=root,
                         stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        for process in processes:
            process.wait(timeout=300)
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    inputs(folder)
    run_group(folder, [*CASES, *STAGES])
    return folder


@pytest.mark.parametrize("name", CASES)
def test_four_processes_give_what_one_gives(name: str, made: Path) -> None:
    told = made / f"{name}.json"
    assert told.is_file(), "\n".join(p.read_text()[-3000:] for p in made.glob("*.error"))
    curves, model = train(CASES[name], Ranks())
    found = json.loads(told.read_text())["curves"]
    assert found.keys() == curves.keys() and {"grad_norm", *(f"loss/{s}" for s in CASES[name].sources)} < curves.keys()
    for key, values in curves.items():
        assert found[key] == pytest.approx(values, rel=1e-5 * CASES[name].rounding), key
    weights = load_file(made / f"{name}.safetensors")
    assert weights.keys() == weights_of(model).keys()
    for key, value in weights_of(model).items():
        bound = 2e-5 * CASES[name].rounding
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=bound, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_saves_the_same_model_under_every_layout(name: str, made: Path, tmp_path: Path) -> None:
    told = made / f"{name}.json"
    assert told.is_file(), "\n".join(p.read_text()[-3000:] for p in made.glob("*.error"))
    found = json.loads(told.read_text())["metrics"]
    alone = stage(STAGES[name][0], "ddp", made, tmp_path)
    for key in ("final_loss", "best_held_out_loss", "bits_per_byte_en", "answer_loss", "best_step", "steps"):
        assert (key in found) == (key in alone.metrics)
        assert found.get(key, 0.0) == pytest.approx(alone.metrics.get(key, 0.0), rel=1e-5), key
    folder = made / name / "out"
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in alone.path.iterdir())
    (file,) = (p.name for p in folder.glob("*.safetensors"))
    ours, theirs = load_file(alone.path / file), load_file(folder / file)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
