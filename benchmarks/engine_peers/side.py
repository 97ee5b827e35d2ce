"""What every side does, whichever engine it drives: load, warm up, answer, print one line of JSON.

A side is a module beside this one, run as `python -m engine_peers.NAME` in an environment of its own. It has

    PRECISIONS                  the precisions that it computes in
    python() -> Path            the interpreter of its environment, made when first asked for
    model(precision) -> Path    the model in its own format, converted when first asked for
    variables() -> dict         what its environment variables must be
    load(args) -> Generate      its engine, ready to answer
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()  # loading includes the imports of whatever is heavier than these

Prompt = list[int]
Generate = Callable[[list[Prompt], list[int]], list[list[int]]]
"""greedy answers to prompts of token ids, asked all at once; each has exactly its length, whatever ends a text"""

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(load: Callable[[argparse.Namespace], Generate]) -> None:
    """Load the engine, let it answer what the work asks, and print the figures and the answers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="JSON: name of a piece → [[prompt, length], …]")
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--option", default="", help="what a side with two ways of doing it is asked for")
    parser.add_argument("--pieces", default="first,stream,batch")
    args = parser.parse_args()
    work: dict[str, list[Any]] = json.loads(args.work.read_text())
    generate = load(args)
    report: dict[str, Any] = {"load": time.perf_counter() - STARTED}
    asked = {name: work[name] for name in args.pieces.split(",")}
    if "batch" in asked:
        _timed(generate, work["warm batch"])
    if len(asked) > ("batch" in asked):
        _timed(generate, work["warm stream"])
    for name, requests in asked.items():
        if name == "first":
            report["first"] = statistics.median(_timed(generate, [request])[0] for request in requests)
            continue
        seconds, answers = _timed(generate, requests)
        report[name] = sum(map(len, answers)) / seconds
        report[f"{name} answers"] = answers
    torch = sys.modules.get("torch")
    if args.device == "cuda" and torch is not None:
        report["device_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(report))


def _timed(generate: Generate, requests: list[Any]) -> tuple[float, list[list[int]]]:
    prompts, lengths = map(list, zip(*requests, strict=True))
    started = time.perf_counter()
    answers = generate(prompts, lengths)
    seconds = time.perf_counter() - started
    if [len(answer) for answer in answers] != lengths:
        raise SystemExit(f"asked for {lengths} tokens, got {[len(answer) for answer in answers]}")
    return seconds, answers
