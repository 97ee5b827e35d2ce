"""What the estimates say of a training, and what it then takes: memory and time, predicted against measured.

    python benchmarks/estimates.py [--quick] [--only NAME]

Each case is a run of the Trainer in a process of its own. Predicted memory is what the plan would say before anything
is loaded (`plan`) and what the run says after its first step (`run`); measured is the process's resident memory at the
end of a step, where freed memory is kept. Time is predicted from the first twenty steps
(`training.estimation.forecast`). The peer is the rule of thumb that is quoted most, 16 bytes a parameter. `equal` says
that all memory was within 15 % and all time within 25 %. Weights are random: their values change neither.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import conclude, measure

SMALL = {"hidden": 192, "layers": 4, "heads": 3, "kv": 1, "inner": 512, "vocabulary": 4096, "length": 256}
MIDDLE = {"hidden": 512, "layers": 8, "heads": 8, "kv": 8, "inner": 1408, "vocabulary": 16_384, "length": 512}
SMOLLM2 = {"hidden": 576, "layers": 30, "heads": 9, "kv": 3, "inner": 1536, "vocabulary": 49_152, "length": 192}
CASES: dict[str, dict[str, Any]] = {
    "2 M, 16 × 256, muon": {**SMALL, "rows": 16, "steps": 60, "optimizer": "muon"},
    "2 M, 16 × 256, compiled": {**SMALL, "rows": 16, "steps": 60, "optimizer": "muon", "compiled": True},
    "2 M, 64 × 256, 8 at once": {**SMALL, "rows": 64, "micro": 8, "steps": 30},
    "33 M, 8 × 512": {**MIDDLE, "rows": 8, "steps": 24},
    "33 M, 8 × 512, compiled": {**MIDDLE, "rows": 8, "steps": 24, "compiled": True},
    "33 M, 8 × 512, 2 at once": {**MIDDLE, "rows": 8, "micro": 2, "steps": 24},
    "33 M, 4 × 512, fp32": {**MIDDLE, "rows": 4, "steps": 4, "dtype": "float32"},
    "33 M, 8 × 512, checkpointing": {**MIDDLE, "rows": 8, "steps": 4, "checkpointing": True},
    "33 M, 4 × 512, adafactor": {**MIDDLE, "rows": 4, "steps": 4, "optimizer": "adafactor"},
    "135 M, LoRA, 8 × 192, 2 at once": {**SMOLLM2, "rows": 8, "micro": 2, "steps": 3, "lora": 16},
    "135 M, 4 × 192, 2 at once": {**SMOLLM2, "rows": 4, "micro": 2, "steps": 3},
    "2 M, 16 × 256, documents": {**SMALL, "rows": 16, "steps": 60, "optimizer": "muon", "packed": "documents"},
    "135 M, conversations": {**SMOLLM2, "rows": 16, "micro": 1, "steps": 12, "packed": "conversations"},
    "135 M, LoRA, conversations": {
        **SMOLLM2, "rows": 16, "micro": 1, "steps": 16, "lora": 16, "packed": "conversations"
    },
}  # fmt: skip
LONGEST = 512  # tokens of a conversation
QUICK = ("2 M, 16 × 256, muon", "33 M, 8 × 512, 2 at once")


def one_case(name: str) -> None:
    """Run one case and print what was predicted and measured."""
    import torch

    from fledge.core.events import Emitter
    from fledge.models.adapters import LoRA, add_lora
    from fledge.training.compiling import compile_layers
    from fledge.training.estimation.memory import CPU, memory_of
    from fledge.training.estimation.needs import row_of_conversations
    from fledge.training.estimation.network import Network
    from fledge.training.estimation.plan import Plan
    from fledge.training.objectives.causal_lm import CausalLM
    from fledge.training.settings import TrainSettings
    from fledge.training.trainer import Trainer

    for room in ("pretraining", "tuning"):  # as the process of a stage has them
        importlib.import_module(f"fledge.training.{room}")
    case = CASES[name]
    dtype, rank = case.get("dtype", "bfloat16"), case.get("lora", 0)
    torch.manual_seed(0)
    model = _model(case, dtype)
    network = Network.of_config(model.config.to_dict())
    if rank:
        model = add_lora(model, LoRA(rank=rank), 0)
        for layer in model.modules():
            if hasattr(layer, "cast_input_dtype_enabled"):
                layer.cast_input_dtype_enabled = dtype == "float32"
    if case.get("compiled"):
        compile_layers(model, Path(".benchmarks/cache"))
    rows, length, packed = case["rows"], case["length"], case.get("packed", "")

    settings = TrainSettings(
        lr=1e-3, schedule="constant", warmup=0, log_every=10, rollbacks=0, dtype=dtype, batch_size=rows,
        optimizer=case.get("optimizer", "adamw"),
    )  # fmt: skip
    micro, again = case.get("micro", 0), case.get("checkpointing", False)
    metrics = Trainer(
        CausalLM(), {"model": model}, _Source(case), settings, case["steps"], 0,
        Emitter("estimates", 0, lambda event: None), micro_batch=micro, activation_checkpointing=again,
    ).fit()  # fmt: skip
    if packed == "conversations":
        length = row_of_conversations(rows, LONGEST)
    plan = Plan(
        network, length, micro or rows, "fp32" if dtype == "float32" else "autocast", settings.optimizer,
        accumulated=0 < micro < rows, lora_rank=rank, checkpointing=again, compiled=case.get("compiled", False),
        packed=bool(packed),
    )  # fmt: skip
    found = {key: value for key, value in metrics.items() if key.startswith(("predicted_", "measured_"))}
    print(json.dumps({**found, "plan": memory_of(plan, CPU).total, "rule": 16 * network.parameters}))


class _Source:
    """Random tokens: rows of one document, rows cut from documents of many lengths, or conversations end to end."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case

    def batch(self, step: int) -> dict[str, Any]:
        from fledge.data.tokens.batches import joined
        from fledge.training.estimation.needs import AT_ONCE

        rows, length, packed = self.case["rows"], self.case["length"], self.case.get("packed")
        random = np.random.default_rng(step)
        if packed == "conversations":
            lengths = np.clip(random.lognormal(4.8, 0.6, rows), 16, LONGEST).astype(int)  # 150 tokens on average
            texts = [_Text(random.integers(0, self.case["vocabulary"], n).tolist(), [1.0] * n) for n in lengths]
            batch = joined(texts, LONGEST, 0, AT_ONCE)
            return {"input_ids": batch.input_ids, "labels": batch.labels, "position_ids": batch.position_ids}
        ids = random.integers(0, self.case["vocabulary"], (rows, length))
        if not packed:
            return {"input_ids": ids, "labels": ids}
        begins = random.random((rows, length)) < 1 / 60  # documents of 60 tokens on average
        begins[:, 0] = True
        places = np.arange(length)
        return {
            "input_ids": ids,
            "labels": ids,
            "position_ids": places - np.maximum.accumulate(np.where(begins, places, 0), axis=1),
        }


class _Text(NamedTuple):
    ids: list[int]
    weights: list[float]


def _model(case: dict[str, Any], dtype: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case["vocabulary"], hidden_size=case["hidden"], intermediate_size=case["inner"],
            num_hidden_layers=case["layers"], num_attention_heads=case["heads"], num_key_value_heads=case["kv"],
            head_dim=case["hidden"] // case["heads"], max_position_embeddings=case["length"], tie_word_embeddings=True,
        )
    )  # fmt: skip
    return model.to(getattr(torch, dtype)) if case.get("lora") else model  # a frozen base is in the arithmetic's format


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases")
    parser.add_argument("--only", default="", help="the cases whose names contain this")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        one_case(args.case)
        return
    names = [name for name in (QUICK if args.quick else CASES) if args.only in name]
    print(f"{'':34}{'measured':>10}{'run':>8}{'plan':>8}{'16 B':>8}{'seconds':>10}{'predicted':>10}")
    worst = {"memory": 0.0, "rule": 0.0, "time": 0.0}
    for name in names:
        found = json.loads(measure([sys.executable, __file__, "--case", name]).output.splitlines()[-1])
        measured = found["measured_memory"]
        shares = [found[key] / measured for key in ("predicted_memory", "plan", "rule")]
        worst["memory"] = max(worst["memory"], *(abs(share - 1) for share in shares[:2]))
        worst["rule"] = max(worst["rule"], abs(shares[2] - 1))
        times = ""
        if "predicted_seconds" in found:
            times = f"{found['measured_seconds']:>10.1f}{found['predicted_seconds'] / found['measured_seconds']:>10.2f}"
            worst["time"] = max(worst["time"], abs(found["predicted_seconds"] / found["measured_seconds"] - 1))
        print(f"{name:34}{measured / 1e6:>7.0f} MB" + "".join(f"{share:>8.2f}" for share in shares) + times, flush=True)
    equal = worst["memory"] <= 0.15 and worst["time"] <= 0.25
    print(f"worst: memory {100 * worst['memory']:.0f} %, time {100 * worst['time']:.0f} %")
    peers = {"16 bytes a parameter": worst["rule"]}
    conclude("estimates", "largest relative error of memory (less is better)", worst["memory"], peers, equal)


if __name__ == "__main__":
    main()
