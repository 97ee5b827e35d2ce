"""Attention in blocks against the attention of torch in float64, and within models against their own attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from fledge.models import block_attention
from fledge.models.block_attention import attention, document_starts, visible
from fledge.training.kernels import FITS, fast_kernels
from fledge.training.likelihood import head_of, hidden_states, weighted_nll


def positions(rows: int, length: int) -> torch.Tensor:
    """Every row holds documents of other lengths, single tokens among them."""
    found = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        at = 0
        for size in [3 + row, 1, length // 3, length]:
            end = min(length, at + size)
            found[row, at:end] = torch.arange(end - at)
            at = end
    return found


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "width", "packed", "window", "scale"),
    [
        (4, 4, 37, 8, False, 0, None),
        (4, 2, 37, 8, True, 0, 0.3),
        (6, 1, 300, 16, False, 0, None),
        (3, 3, 600, 8, True, 0, None),
        (4, 2, 513, 8, True, 70, None),
        (4, 2, 530, 8, False, 300, None),
        (2, 1, 1, 8, False, 0, None),
    ],
)
def test_equal_to_the_attention_of_torch(
    heads: int, kv_heads: int, length: int, width: int, packed: bool, window: int, scale: float | None
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, heads, length, width, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, kv_heads, length, width, dtype=torch.float64, requires_grad=True) for _ in range(2))
    starts = document_starts(positions(2, length)) if packed else None
    mask = visible(torch.zeros(2, length, dtype=torch.int32) if starts is None else starts, window)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, scale=scale)
    found = attention(query, key, value, starts, window, scale)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-12)
    ours = torch.autograd.grad(found, (query, key, value), upstream)
    theirs = torch.autograd.grad(expected, (query, key, value), upstream.transpose(1, 2))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_bf16_is_as_exact_as_the_attention_of_torch() -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, 4, 300, 32, dtype=torch.float64) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    rounded = [x.bfloat16() for x in exact]
    ours = attention(*rounded).transpose(1, 2).double()
    theirs = F.scaled_dot_product_attention(*rounded, is_causal=True).double()
    assert (ours - expected).norm() < 1.5 * (theirs - expected).norm()


SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=7),
    "qwen2": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "glm": GlmConfig(**SMALL, head_dim=8, pad_token_id=0),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


def loss_and_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, list[torch.Tensor]]:
    """Summed over batches: hidden states weighted by what they are, so that every one of them counts."""
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        total, _ = weighted_nll(hidden_states(model, batch), head_of(model), batch["input_ids"])
        total.backward()
        loss += float(total.detach())
    return loss, [p.grad.clone() for p in model.parameters()]


def alone(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Every document of packed rows as a batch of its own."""
    found = []
    for ids, places in zip(batch["input_ids"], batch["position_ids"], strict=True):
        firsts = [*torch.nonzero(places == 0).flatten().tolist(), len(ids)]
        found += [{"input_ids": ids[None, a:b]} for a, b in pairwise(firsts)]
    return found


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("packed", [True, False])
def test_a_model_trains_as_with_its_own_attention(family: str, packed: bool) -> None:
    """Rows that are packed: as with its own attention on every document alone."""
    assert family in FITS
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).double().train()
    batch = {"input_ids": torch.randint(0, 97, (3, 41))}
    if packed:
        batch["position_ids"] = positions(3, 41)
    before = model.config._attn_implementation
    loss, gradients = loss_and_gradients(model, alone(batch) if packed else [batch])
    with fast_kernels([model], "cpu"):
        assert model.config._attn_implementation == block_attention.NAME
        found, ours = loss_and_gradients(model, [batch])
    assert model.config._attn_implementation == before
    assert found == pytest.approx(loss, rel=1e-12)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_dropout_of_probabilities_and_other_models_keep_their_own_attention() -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, attention_dropout=0.5)).train()
    batch = {"input_ids": torch.randint(0, 97, (2, 20)), "position_ids": positions(2, 20)}
    with fast_kernels([model], "cpu"):
        torch.manual_seed(4)
        first = hidden_states(model, batch)
        torch.manual_seed(5)
        second = hidden_states(model, batch)
        model.eval()
        settled = hidden_states(model, batch)
    assert not torch.equal(first, second)
    torch.testing.assert_close(settled, hidden_states(model, batch), rtol=1e-4, atol=1e-5)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    with fast_kernels([bloom], "cpu"):
        assert bloom.config._attn_implementation != block_attention.NAME
