"""A made-up run with everything that a report shows, and text that tries to break out of the page."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from fledge.core.events import Event
from fledge.core.intervals import Interval, mcnemar, paired_proportions, wilson
from fledge.evaluation.run_view import RunView, StageView
from fledge.records.rejects import Rejects

HOSTILE = '<script>document.title="broken"</script><img src=x onerror="document.title=1">'
PROMPTS = [
    "Hello, how are you today?",
    "What did you do last weekend?",
    "你好，今天过得怎么样？",
    "“画蛇添足”是什么意思？",
]


def run_view(folder: Path) -> RunView:
    """The run of a recipe like `hatch`, with its evaluation on disk below `folder`."""
    scores = folder / "evaluate"
    _write_scores(scores)
    refined = folder / "refine"
    with Rejects(refined) as rejects:
        row = json.dumps(
            {"messages": [{"role": "user", "content": HOSTILE + "ok " * 200}, {"role": "assistant", "content": "fine"}]}
        )
        rejects.add("quality", "too few words", "0.02", row, "a1")
        rejects.add("language", "neither English nor Chinese", "fr", json.dumps({"text": "Bonjour à tous"}), "a2")
    stages = [
        _stage("dialogues", "data.collect", 8.1, {"rows": 10_112, "bytes": 14_201_000}, kind="conversations"),
        _stage(
            "talk",
            "data.refine",
            41.0,
            {
                "rows_in": 10_112,
                "rows_out": 8_630,
                "bytes_in": 14_201_000,
                "bytes_out": 12_905_010,
                "rows_by_language": {"en": 6_180, "zh": 2_450},
                "bytes_by_language": {"en": 11_000_000, "zh": 1_905_010},
                "rejected": {
                    "near_duplicates": {"near copy": 411},
                    "language": {"neither English nor Chinese": 42},
                    "quality": {"too few words": 610, "too many symbols": 31},
                    "exact_duplicates": {"seen before": 388},
                },
                "pii": {"email": 12, "phone": 31},
                "seconds_by_step": {"quality": 3.2},
            },
            path=refined,
            kind="conversations",
            inputs={"data": {"stage": "dialogues", "fingerprint": "ab" * 32}},
        ),
        _stage(
            "split",
            "data.split",
            2.2,
            {"train": {"rows": 8_400, "bytes": 12_700_000}, "held_out": {"rows": 230, "bytes": 200_000}},
            parts=True,
        ),
        _stage(
            "tokenizer",
            "tokenizer.train",
            12.4,
            {"vocabulary": 4096, "bytes_per_token": {"en": 3.31, "zh": 4.08}},
            kind="tokenizer",
        ),
        _stage(
            "base",
            "train.pretrain",
            236.5,
            {
                "tokens": 3_000_000,
                "bits_per_byte_en": 2.118,
                "bits_per_byte_zh": 1.781,
                "xz_bits_per_byte_en": 2.902,
                "xz_bits_per_byte_zh": 1.913,
                "untrained_bits_per_byte_en": 3.68,
                "untrained_bits_per_byte_zh": 2.95,
                "ngram_bits_per_byte_en": 2.31,
                "ngram_bits_per_byte_zh": 1.74,
            },
            kind="model",
            inputs={"data.0": {"stage": "split.train", "fingerprint": "cd" * 32}},
        ),
        _stage("chat", "train.sft", 61.2, {"final_loss": 2.9}, kind="model"),
        _stage("reward", "train.reward", 22.0, {}, kind="reward-model"),
        _stage("aligned", "train.dpo", 40.3, {}, kind="model"),
        _stage("small", "quantize", 3.1, {}, kind="model"),
        _stage("scores", "evaluate", 35.0, {}, path=scores, kind="scores"),
    ]
    machine = {"processor": "AMD EPYC 9R45", "cores": 2, "memory": 25.1e9}
    recipe = "name: hatch\nseed: 42\nstages:\n  base: {use: train.pretrain, tokens: 3M}\n  # " + HOSTILE + "\n"
    return RunView("hatch", recipe, 1_795_000_000.0, machine, stages, _events())


def _stage(
    name: str,
    use: str,
    seconds: float,
    metrics: dict[str, Any],
    path: Path | None = None,
    kind: str = "",
    inputs: dict[str, Any] | None = None,
    parts: bool = False,
) -> StageView:
    outputs = (
        {"train": {"kind": "conversations"}, "held_out": {"kind": "conversations"}}
        if parts
        else {"": {"kind": kind, "path": ""}}
    )
    return StageView(
        name,
        use,
        "made",
        seconds,
        (name.encode().hex() * 8)[:64],
        str(path or ""),
        inputs or {},
        metrics,
        outputs,
        config={"steps": ["language", {"quality": {}}, "exact_duplicates", "near_duplicates"], "note": "中文 " + name}
        | ({"models": {"int8": "small"}} if use == "evaluate" else {}),
        estimate={"seconds": [0.6 * seconds, 1.5 * seconds] if name != "chat" else [10, 30], "memory": [4e8, 1.6e9]},
        peak_memory=9e8 + 1e6 * seconds,
        execution={"device": "cpu", "threads": 2},
        versions={"python": "3.11.9", "torch": "2.13.0"},
    )


def _events() -> list[Event]:
    events = []
    for stage, steps, start, end in (("base", 460, 8.3, 3.9), ("chat", 120, 3.8, 2.9), ("aligned", 60, 0.6931, 0.61)):
        for step in range(1, steps + 1):
            noise = 0.12 * math.sin(step * 12.9898) * (end if stage != "aligned" else 0.2)
            loss = end + (start - end) * math.exp(-5 * step / steps) + noise
            for name, value in (
                ("loss", loss),
                ("causal_lm", loss),
                ("grad_norm", 0.4 + 3 / step + abs(noise)),
                ("lr", 3e-3 * (1 - step / steps)),
                ("tokens_per_second", 15_900 + 100 * noise),
            ):
                events.append(Event("metric", stage, 0, step, name, value))
            if step % 60 == 0 and stage == "base":
                events += [
                    Event("metric", stage, 0, step, f"bits_per_byte_{lang}", floor + 2 * math.exp(-5 * step / steps))
                    for lang, floor in (("en", 2.1), ("zh", 1.77))
                ]
    return events


def _write_scores(folder: Path) -> None:
    def row(kind: str, size: int, metrics: dict[str, Any], chat: bool = True) -> dict[str, Any]:
        shown = {k: v.to_json() if isinstance(v, Interval) else v for k, v in metrics.items()}
        return {"kind": kind, "chat": chat, "parameters": 2_361_000, "bytes": size, "metrics": shown}

    def language(en: float, zh: float, loss: float) -> dict[str, Any]:
        return {
            "bits_per_byte_en": en,
            "bits_per_byte_zh": zh,
            "answer_loss": Interval(loss, loss - 0.05, loss + 0.05, 230),
            "answer_loss_en": Interval(loss + 0.1, loss, loss + 0.2, 150),
            "answer_loss_zh": Interval(loss - 0.2, loss - 0.3, loss - 0.1, 80),
        }

    models = {
        "base": row(
            "model",
            9_450_000,
            language(2.118, 1.781, 4.21)
            | {"preference_accuracy_likelier": wilson(60, 120), "hellaswag_acc": wilson(26, 100)},
            chat=False,
        ),
        "chat": row(
            "model",
            9_450_000,
            language(2.203, 1.830, 3.35)
            | {"preference_accuracy_likelier": wilson(66, 120), "hellaswag_acc": wilson(24, 100)},
        ),
        "aligned": row(
            "model",
            9_450_000,
            language(2.22, 1.84, 3.37)
            | {
                "preference_accuracy": wilson(79, 120),
                "preference_accuracy_likelier": wilson(75, 120),
                "hellaswag_acc": wilson(27, 100),
            },
        ),
        "int8": row(
            "model",
            3_120_000,
            language(2.221, 1.841, 3.37) | {"preference_accuracy": wilson(79, 120), "hellaswag_acc": wilson(27, 100)},
        ),
        "reward": row("reward-model", 9_400_000, {"preference_accuracy": wilson(84, 120)}),
    }
    names = ["base", "chat", "aligned", "int8"]
    losses = {"base": 4.21, "chat": 3.35, "aligned": 3.37, "int8": 3.37}
    differences = [
        {
            "metric": "answer_loss",
            "model": b,
            "against": a,
            "value": losses[b] - losses[a],
            "low": losses[b] - losses[a] - 0.03,
            "high": losses[b] - losses[a] + 0.03,
            "n": 230,
        }
        for a, b in pairwise(names)
    ]
    choices = [
        {
            "metric": "hellaswag_acc",
            "model": "chat",
            "against": "base",
            **paired_proportions(6, 8, 100).to_json(),
            "p": mcnemar(6, 8),
        }
    ]
    tasks = [
        {
            "key": "bits_per_byte",
            "task": "bits_per_byte",
            "baselines": {"xz": {"bits_per_byte_en": 2.902, "bits_per_byte_zh": 1.913}},
            "comparisons": [],
        },
        {"key": "answer_loss", "task": "answer_loss", "baselines": {}, "comparisons": differences},
        {
            "key": "preference_accuracy",
            "task": "preference_accuracy",
            "comparisons": [],
            "baselines": {
                "longer_answer": {"preference_accuracy": wilson(65, 120).to_json()},
                "likelier_to_reference": {"preference_accuracy": wilson(66, 120).to_json()},
            },
        },
        {
            "key": "hellaswag",
            "task": "choice",
            "baselines": {"chance": {"hellaswag_acc": 0.25}},
            "comparisons": choices,
        },
        {"key": "samples", "task": "samples", "baselines": {}, "comparisons": []},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(
        json.dumps({"models": models, "tasks": tasks}, ensure_ascii=False), encoding="utf-8"
    )
    english, chinese = (
        "I am doing well. How about you? I went to the store with my friend.",
        "我很好，谢谢你的关心。今天天气不错，我去公园走了走。",
    )
    for name in names:
        lines = []
        for index, prompt in enumerate(PROMPTS):
            text = english if index < 2 else chinese
            if index == 1:
                text = HOSTILE if name == "aligned" else "I think that is a good idea, " * 6 if name == "base" else text
            item = {
                "prompt": prompt,
                "text": text,
                "chat": name != "base",
                "ended": "length" if name == "base" else "stop",
            }
            lines.append(json.dumps(item, ensure_ascii=False))
        file = folder / "items" / "samples" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
