"""transformers: `generate` in static batches, and `generate_batch`'s continuous batching.

`generate` gets its best: batches of 16 put together from requests of like length, which only a benchmark knows
beforehand, so that few rows wait for the longest; padded on the left. `generate_batch` is driven through the manager
behind it, because the function itself gives all requests one length. Its cache has the blocks that its requests fill
(its own default takes half the machine's memory), and on a processor 16 requests run together: its attention there
compares every request with the keys of all.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import material
import peers

from engine_peers import side

PRECISIONS = ("fp32", "bf16")
REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.*", "accelerate", "psutil")
CONTINUOUS = "generate_batch"
ROWS, PAGE, BATCH_TOKENS = 16, 32, 512


def python(device: str = "cpu") -> Path:
    """On a GPU the installed torch, which is the one that knows it."""
    return Path(sys.executable) if device == "cuda" else peers.environment("transformers", *REQUIREMENTS)


def model(precision: str) -> Path:
    return material.smollm2() / "base"


def variables() -> dict[str, str]:
    return {}


def load(args: argparse.Namespace) -> side.Generate:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").to(args.device)
    return _continuous(model) if args.option == CONTINUOUS else _static(model.eval())


def _static(model: Any) -> side.Generate:
    import torch

    def generate(prompts: list[side.Prompt], lengths: list[int]) -> list[list[int]]:
        answers: list[list[int]] = [[]] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: (lengths[index], len(prompts[index])))
        for start in range(0, len(order), ROWS):
            group = order[start : start + ROWS]
            width, most = max(len(prompts[index]) for index in group), max(lengths[index] for index in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(group):
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            made = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False, max_new_tokens=most,
                pad_token_id=0,
            )  # fmt: skip
            for row, index in enumerate(group):
                answers[index] = made[row, width : width + lengths[index]].tolist()
        return answers

    model.generation_config.eos_token_id = None  # no text ends early
    return generate


def _continuous(model: Any) -> side.Generate:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    together = ROWS if model.device.type == "cpu" else 4 * ROWS
    settings = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=together * 512 // PAGE, max_batch_tokens=BATCH_TOKENS,
        max_requests_per_batch=together, allow_block_sharing=False,
    )  # fmt: skip
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def generate(prompts: list[side.Prompt], lengths: list[int]) -> list[list[int]]:
        found: dict[str, list[int]] = {}
        with model.continuous_batching_context_manager(greedy, continuous_batching_config=settings, warmup=False,
                                                       persistent_manager=True) as manager:  # fmt: skip
            names = [
                manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            while len(found) < len(names):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise SystemExit("generate_batch has ended by itself")
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise SystemExit(result.error)
                    found[result.request_id] = result.generated_tokens
        return [found[name] for name in names]

    return generate


if __name__ == "__main__":
    side.run(load)
