"""Shapes: what a size comes to, and parameter counts in closed form against the real models."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fledge.models.build import build_model
from fledge.models.shape import ModelShape


def test_two_million() -> None:
    shape = ModelShape(size="2M").resolve(4096, 256)
    assert (shape.hidden, shape.layers, shape.intermediate, shape.context) == (192, 4, 512, 256)
    assert shape.kv_heads < shape.heads and shape.heads * shape.head_dim == 192
    assert shape.parameters == 2_361_024


@pytest.mark.parametrize(
    ("size", "vocab"), [("500k", 1000), ("2M", 4096), ("10M", 8192), ("135M", 49152), ("7B", 32000)]
)
def test_a_size_is_about_met(size: str, vocab: int) -> None:
    shape = ModelShape(size=size)
    assert 0.7 < shape.parameters(vocab) / (shape.size or 0) < 1.4


@pytest.mark.parametrize(
    "given",
    [
        {"size": "200k"},
        {"hidden": 96, "layers": 3},
        {"hidden": 96, "layers": 2, "attention": "mha", "tie_embeddings": False},
        {"hidden": 128, "layers": 2, "attention": "mqa", "intermediate": 300},
        {"hidden": 96, "layers": 2, "heads": 6, "kv_heads": 3},
        {"hidden": 96, "layers": 1, "heads": 4, "head_dim": 32},
    ],
)
def test_the_closed_form_counts_what_is_built(given: dict[str, object]) -> None:
    shape = ModelShape(**given)
    assert build_model(shape.resolve(500), 0).num_parameters() == shape.parameters(500)


def test_llama_7b_by_the_book() -> None:
    shape = ModelShape(
        hidden=4096, layers=32, heads=32, attention="mha", head_dim=128, intermediate=11008, tie_embeddings=False
    ).resolve(32000)
    assert shape.parameters == 6_738_415_616
    per_token = shape.training_flops(1, 2048)
    assert per_token == pytest.approx(6 * (6_738_415_616 - 32000 * 4096) + 12 * 32 * 4096 * 2048, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "give either size"),
        ({"size": "2M", "hidden": 64}, "give either size"),
        ({"hidden": 64}, "go together"),
        ({"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 3}, "multiple"),
        ({"hidden": 63, "layers": 2, "heads": 3}, "even head_dim"),
        ({"size": "2M", "attention": "linear"}, "attention"),
        ({"size": "2M", "width": 3}, "width"),
    ],
)
def test_what_makes_no_model_is_refused(given: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        ModelShape(**given)


def test_the_seed_decides_the_weights_and_nothing_else_moves() -> None:
    import torch

    shape = ModelShape(hidden=32, layers=2).resolve(64)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = build_model(shape, 1), build_model(shape, 1), build_model(shape, 2)
    assert torch.equal(torch.rand(1), expected)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
