"""Shapes: what a size comes to, and parameter counts in closed form against the real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from fledge.core.errors import FledgeError
from fledge.models.build import build_model, make_config
from fledge.models.dropout import keys_of_config
from fledge.models.families import FAMILIES
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
    shape = ModelShape(hidden=32, layers=2).resolve(64)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = build_model(shape, 1), build_model(shape, 1), build_model(shape, 2)
    assert torch.equal(torch.rand(1), expected)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


FAMILY_SHAPES: list[dict[str, object]] = [
    *({"family": name} for name in FAMILIES),
    *({"family": name, "window": 5} for name in ("mistral", "qwen2", "qwen3")),
    *({"family": name, "attention": "mqa", "tie_embeddings": True} for name in ("mistral", "qwen3", "glm")),
    *({"family": name, "tie_embeddings": False} for name in ("qwen2", "gpt2", "bloom", "xglm")),
    {"family": "qwen3", "head_dim": 16, "intermediate": 100},
    {"family": "t5", "decoder_layers": 1, "head_dim": 6},
    {"family": "bart", "decoder_layers": 5, "intermediate": 70},
    {"family": "electra", "embedding": 20},
    {"family": "deberta-v3", "context": 11},
]


@pytest.mark.parametrize("given", FAMILY_SHAPES, ids=str)
def test_every_family_counts_what_is_built(given: dict[str, object]) -> None:
    shape = ModelShape(**{"hidden": 40, "layers": 3, "heads": 5, "head_dim": 8, "context": 37, **given}).resolve(101)
    model = build_model(shape, 0)
    assert model.num_parameters() == shape.parameters
    assert type(model).__name__ == shape.about.model
    if shape.family == "electra":
        generator = shape.generator(0.4)
        assert (generator.heads, generator.hidden, generator.embedding_width) == (2, 16, shape.embedding_width)
        assert build_model(generator, 0).num_parameters() == generator.parameters


BOOK: dict[str, tuple[dict[str, object], int, int, int]] = {
    "GPT-2": ({"family": "gpt2", "hidden": 768, "layers": 12, "heads": 12}, 50_257, 1024, 124_439_808),
    "GPT-3": ({"family": "gpt2", "hidden": 12_288, "layers": 96, "heads": 96}, 50_257, 2048, 174_604_259_328),
    "BLOOM-560m": ({"family": "bloom", "hidden": 1024, "layers": 24, "heads": 16}, 250_880, 2048, 559_214_592),
    "Mistral-7B": (
        {"family": "mistral", "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate": 14_336,
         "tie_embeddings": False}, 32_000, 32_768, 7_241_732_096),
    "Qwen2-0.5B": (
        {"family": "qwen2", "hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate": 4864},
        151_936, 32_768, 494_032_768),
    "Qwen3-0.6B": (
        {"family": "qwen3", "hidden": 1024, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128,
         "intermediate": 3072}, 151_936, 32_768, 596_049_920),
    "GLM-4-9B": (
        {"family": "glm", "hidden": 4096, "layers": 40, "heads": 32, "kv_heads": 2, "intermediate": 13_696},
        151_552, 131_072, 9_399_951_360),
    "Baichuan-7B": (
        {"family": "baichuan", "hidden": 4096, "layers": 32, "heads": 32, "intermediate": 11_008},
        64_000, 4096, 7_000_559_616),
    "BERT-base": ({"family": "bert", "hidden": 768, "layers": 12, "heads": 12}, 30_522, 512, 109_514_298),
    "RoBERTa-base": ({"family": "roberta", "hidden": 768, "layers": 12, "heads": 12}, 50_265, 512, 124_697_433),
    "ELECTRA-small": (
        {"family": "electra", "hidden": 256, "layers": 12, "heads": 4, "embedding": 128}, 30_522, 512, 13_549_057),
    "T5-base": ({"family": "t5", "hidden": 768, "layers": 12, "heads": 12}, 32_128, 512, 222_903_552),
    "BART-base": ({"family": "bart", "hidden": 768, "layers": 6, "heads": 12}, 50_265, 1024, 139_420_416),
}  # fmt: skip


@pytest.mark.parametrize("name", BOOK)
def test_published_models_by_the_book(name: str) -> None:
    given, vocabulary, context, parameters = BOOK[name]
    assert ModelShape(**given).resolve(vocabulary, context).parameters == parameters


@pytest.mark.parametrize(
    ("given", "family"),
    [
        ({}, "llama"),
        ({"attention": "mqa"}, "llama"),
        ({"window": "1k"}, "mistral"),
        ({"attention": "sliding", "window": 64}, "mistral"),
        ({"positions": "learned"}, "gpt2"),
        ({"positions": "learned", "attention": "mqa"}, "gpt_bigcode"),
        ({"positions": "alibi"}, "bloom"),
        ({"positions": "sinusoidal"}, "xglm"),
        ({"family": "baichuan"}, "baichuan"),
        ({"family": "baichuan", "positions": "alibi"}, "bloom"),
        ({"architecture": "encoder"}, "bert"),
        ({"architecture": "encoder", "positions": "relative"}, "deberta-v3"),
        ({"architecture": "encoder-decoder"}, "t5"),
        ({"architecture": "encoder-decoder", "positions": "learned"}, "bart"),
    ],
)
def test_the_fields_words_pick_the_class(given: dict[str, object], family: str) -> None:
    shape = ModelShape(size="2M", **given)
    assert shape.family_name == family and shape.kind == FAMILIES[family].kind
    assert 0.4 < shape.parameters(4096) / 2e6 < 2.5


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"positions": "alibi", "attention": "gqa"}, r"alibi.*bloom"),
        ({"positions": "sinusoidal", "attention": "mqa"}, r"sinusoidal.*xglm"),
        ({"positions": "relative"}, "no class of transformers"),
        ({"architecture": "encoder", "positions": "rope"}, r"encoder with rope.*deberta-v3"),
        ({"family": "gpt2", "positions": "rope"}, r"gpt2 with rope.*learned"),
        ({"family": "llama", "window": 64}, r"llama with window.*gqa/mha/mqa \+ rope"),
        ({"family": "bert", "attention": "gqa"}, "bert with gqa"),
        ({"attention": "sliding"}, "needs its window"),
        ({"family": "bert", "architecture": "decoder"}, "another kind of model: encoder"),
        ({"family": "bert", "tie_embeddings": False}, "always shares"),
        ({"family": "gpt2", "rope_scaling": {"factor": 2}}, "no rotary positions"),
        ({"decoder_layers": 2}, "no decoder beside"),
        ({"embedding": 32}, "only electra"),
        ({"dropout": {"hidden": 0.1}}, r"no dropout there[\s\S]*attention"),
        ({"family": "t5", "dropout": {"attention": 0.1}}, r"no dropout there[\s\S]*classifier, hidden"),
        ({"dropout": {"attention": 1.0}}, "less than 1"),
        ({"dropout": {"nose": 0.1}}, "nose"),
        ({"family": "chatgpt"}, "family"),
        ({"hidden": 64, "layers": 2, "family": "gpt2", "heads": 3}, "hidden = heads"),
        ({"hidden": 64, "layers": 2, "family": "gpt2", "kv_heads": 2, "heads": 4}, "no grouped"),
        ({"hidden": 64, "layers": 2, "family": "glm", "head_dim": 6}, "multiple of 4"),
        ({"hidden": 64, "layers": 2, "family": "bloom", "intermediate": 100}, "4 · hidden"),
    ],
)
def test_what_no_class_has_is_refused_in_one_sentence(given: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word) as caught:
        ModelShape(**({"size": "2M", **given} if "hidden" not in given else given))
    assert caught.value.error_count() == 1


def test_dropout_by_part_reaches_every_family() -> None:
    for name, family in FAMILIES.items():
        parts = dict.fromkeys(family.dropout, 0.25)
        shape = ModelShape(family=name, hidden=32, layers=1, heads=2, dropout=parts).resolve(40, 16)
        config = make_config(shape)
        values = {key: getattr(config, key) for keys in family.dropout.values() for key in keys}
        assert set(values.values()) == {0.25}, name
        assert keys_of_config(config, parts) == values  # a checkpoint of the family is told the same
    dropped = build_model(
        ModelShape(family="gpt2", hidden=32, layers=1, heads=2, dropout={"embedding": 0.5}).resolve(40, 16), 0
    )
    assert dropped.transformer.drop.p == 0.5 and dropped.transformer.h[0].mlp.dropout.p == 0.1
    with pytest.raises(FledgeError, match="no dropout there"):
        keys_of_config(dropped.config, {"activation": 0.1})


def test_a_size_with_heads_finds_a_width_that_they_divide() -> None:
    for given in ({"heads": 3}, {"heads": 3, "family": "bert"}, {"heads": 6, "kv_heads": 2, "family": "qwen2"}):
        shape = ModelShape(size="2M", **given).resolve(1000)
        assert shape.hidden % shape.heads == 0 and shape.head_dim % 2 == 0
        assert build_model(shape, 0).num_parameters() == shape.parameters


def test_what_writes_into_the_residual_stream_starts_smaller_with_depth() -> None:
    ends = {
        "llama": ("o_proj", "q_proj"), "glm": ("mlp.down_proj", "gate_up_proj"), "gpt2": ("attn.c_proj", "c_attn"),
        "bloom": ("dense_4h_to_h", "dense_h_to_4h"), "xglm": ("fc2", "fc1"),
        "bert": ("attention.output.dense", "query"),
    }  # fmt: skip
    for family, (writes, other) in ends.items():
        model = build_model(ModelShape(family=family, hidden=64, layers=8, heads=4).resolve(50, 16), 0)
        spread = [
            torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith(f"{end}.weight")]).std()
            for end in (writes, other)
        ]
        assert float(spread[0] / spread[1]) == pytest.approx(1 if family == "bert" else 0.25, rel=0.05), family


def test_operations_of_a_window_and_of_two_stacks() -> None:
    plain = ModelShape(family="mistral", hidden=64, layers=2, heads=4, attention="gqa").resolve(100, 1024)
    narrow = replace(plain, window=128)
    assert plain.training_flops(1, 1024) - narrow.training_flops(1, 1024) == 12 * 2 * 64 * (1024 - 128)
    both = ModelShape(family="bart", hidden=64, layers=2, heads=4).resolve(100, 1024)
    weights = both.layers * both.layer_parameters + both.decoder_layers * both.decoder_layer_parameters + 100 * 64
    assert both.training_flops(2, 64) == pytest.approx(6 * weights + 12 * 64 * 64 * (2 + 2 * 2))
