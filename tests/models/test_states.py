"""Packed documents never attend to each other: every family of decoders, every kernel, windows and ALiBi included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration

from fledge.core.errors import FledgeError
from fledge.models import block_attention
from fledge.models.adapters import LoRA, add_lora
from fledge.models.attention import TESTED, Device, kernel_for
from fledge.models.build import build_model
from fledge.models.families import DECODER, FAMILIES
from fledge.models.shape import ModelShape
from fledge.models.states import decoder_of, packed_mask, packed_states
from fledge.training.likelihood import hidden_states

LENGTH = 41
CUTS = [[0, 13, 14, 30], [0], [0, 1, 2, 25]]  # where documents begin, documents of one token among them
DECODERS = [name for name, family in FAMILIES.items() if family.kind == DECODER]
WINDOWED = [name for name in DECODERS if FAMILIES[name].window]


def model_of(family: str, **given: Any) -> Any:
    shape = ModelShape(family=family, hidden=48, layers=2, heads=4, **given)
    return sharpened(build_model(shape.resolve(120, 64), 3).eval())


def sharpened(model: Any) -> Any:
    """Larger queries and keys than a fresh model's, so that what is attended to matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(word in name for word in ("q_proj", "k_proj", "c_attn", "query_key_value")):
                parameter.mul_(8)
    return model


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids (3, 41), and positions that restart at the cuts."""
    ids = torch.randint(5, 120, (len(CUTS), LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).repeat(len(CUTS), 1)
    for row, starts in enumerate(CUTS):
        for start in starts:
            positions[row, start:] = torch.arange(LENGTH - start)
    return ids, positions


@torch.no_grad()
def farthest(model: Any) -> tuple[float, float]:
    """How far the logits of packed documents are from those of each document alone; and from a row read as one."""
    ids, positions = packed()
    found = model.get_output_embeddings()(hidden_states(model, {"input_ids": ids, "position_ids": positions}))
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    worst = 0.0
    for row, starts in enumerate(CUTS):
        for start, end in zip(starts, [*starts[1:], LENGTH], strict=True):
            alone = model(ids[row : row + 1, start:end], use_cache=False).logits[0]
            worst = max(worst, float((found[row, start:end] - alone).abs().max()))
    mixed = float((found - model(ids, use_cache=False).logits).abs().max())
    model.config._attn_implementation = before
    return worst, mixed


@pytest.mark.parametrize("family", DECODERS)
def test_a_document_in_a_packed_row_is_as_it_is_alone(family: str) -> None:
    model = model_of(family)
    worst, mixed = farthest(model)
    assert worst < 1e-5 and mixed > 1e-2
    ids, _ = packed()
    with torch.no_grad():  # a row of one document is transformers' own forward pass
        theirs = model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        positions = torch.arange(LENGTH).repeat(len(ids), 1)
        for batch in ({"position_ids": positions}, {"attention_mask": torch.ones_like(ids)}):
            torch.testing.assert_close(hidden_states(model, {"input_ids": ids, **batch}), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_an_adapted_model_keeps_them_apart_too(family: str) -> None:
    model = add_lora(model_of(family), LoRA(rank=4), 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    assert farthest(model)[0] < 1e-5


@pytest.mark.parametrize("kernel", ["sdpa", "eager", block_attention.NAME])
@pytest.mark.parametrize("family", ["gpt2", *WINDOWED])
def test_kernels_agree_with_and_without_windows(family: str, kernel: str) -> None:
    for given in ({}, {"window": 7}) if family in WINDOWED else ({},):
        model = model_of(family, **given)
        model.set_attn_implementation(kernel)
        worst, _ = farthest(model)
        assert worst < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_flex_attention_makes_its_mask_from_the_positions(family: str) -> None:
    model = model_of(family, **({"window": 7} if family in WINDOWED else {}))
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # its compiled kernels take a minute to build on a CPU
        assert farthest(model)[0] < 1e-5


def test_layers_with_and_without_a_window_in_one_model() -> None:
    config = model_of("qwen2", window=7).config
    config.layer_types = ["full_attention", "sliding_attention"]
    for kernel in ("sdpa", "eager", block_attention.NAME):
        torch.manual_seed(0)
        model = sharpened(Qwen2ForCausalLM(config).eval())
        model.set_attn_implementation(kernel)
        assert farthest(model)[0] < 1e-5


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, window: int) -> Any:
    """What FlashAttention's variable-length function computes: (tokens, heads, width)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    parts = []
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        mask = packed_mask(torch.arange(b - a)[None], window if window > 0 else None)[0]
        parts.append(F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (query, key, value)), mask))
    return torch.cat([part.transpose(0, 1) for part in parts])


@pytest.mark.parametrize("family", sorted(TESTED))
def test_flash_attention_is_given_the_boundaries(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention runs on GPUs alone: here a plain function takes its place and is called as it would be."""
    import transformers.integrations.flash_attention as integration
    import transformers.modeling_flash_attention_utils as flash

    calls = []

    def varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **rest: Any) -> Any:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and rest["max_seqlen_q"] == LENGTH and rest["causal"]
        calls.append(cu_seqlens_q.tolist())
        return reference(q, k, v, cu_seqlens_q, rest.get("window", 0))

    def options(**given: Any) -> dict[str, Any]:
        named = {"max_seqlen_q", "max_seqlen_k"}
        window = given.get("sliding_window") or 0
        return {**{k: v for k, v in given.items() if k in named}, "causal": given["is_causal"], "window": window}

    functions = (None, varlen, None, None, None), (options, options)
    monkeypatch.setattr(integration, "get_target_dtype", lambda *args: None)  # everything stays in fp32
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **rest: functions)
    for given in ({}, {"window": 7}) if family in WINDOWED else ({},):
        model = model_of(family, **given)
        model.config._attn_implementation = "flash_attention_2"
        assert farthest(model)[0] < 1e-5
        starts = [row * LENGTH + start for row, cuts in enumerate(CUTS) for start in cuts]
        assert calls[0] == [*starts, len(CUTS) * LENGTH]


def test_bloom_restarts_its_bias_so_that_half_precision_is_as_exact_as_alone() -> None:
    """An ALiBi bias that counts on through the row reaches hundreds, where bf16 knows whole numbers only."""
    model = model_of("bloom").bfloat16()
    assert farthest(model)[0] < 1e-2
    ids, positions = packed()
    body = decoder_of(model)
    packed_states(body, ids, positions)
    assert body.config._attn_implementation == "eager" and "build_alibi_tensor" not in vars(body)


def test_bloom_keeps_documents_apart_under_activation_checkpointing() -> None:
    ids, positions = packed()
    gradients = []
    for checkpointed in (False, True):
        model = model_of("bloom").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        packed_states(decoder_of(model), ids, positions).square().sum().backward()
        gradients.append(model.transformer.h[0].self_attention.query_key_value.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_packed_is_refused() -> None:
    tiny = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = torch.arange(6)[None]
    bert = BertForMaskedLM(BertConfig(**tiny, intermediate_size=8))
    with pytest.raises(FledgeError, match=r"see each other.*\n.*bert"):
        packed_states(decoder_of(bert), ids, ids)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(FledgeError, match="t5"):
        packed_states(t5.encoder, ids, ids)


def test_a_window_narrows_the_mask() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 1, 1],
        ]
    ).bool()
    assert torch.equal(packed_mask(positions, 2)[0, 0], expected)


ALL = frozenset({"flash_attention_3", "flash_attention_2", "flex_attention", "sdpa", "eager"})
HOPPER, AMPERE, TURING = (9, 0), (8, 6), (7, 5)


@pytest.mark.parametrize(
    ("family", "device", "dtype", "dropout", "expected"),
    [
        ("llama", Device(), torch.bfloat16, 0, "sdpa"),
        ("bloom", Device(), torch.bfloat16, 0, "eager"),
        ("llama", Device("cuda", HOPPER, ALL), torch.bfloat16, 0, "flash_attention_3"),
        ("llama", Device("cuda", HOPPER, ALL), torch.bfloat16, 0.1, "flash_attention_2"),
        ("mistral", Device("cuda", AMPERE, ALL), torch.float16, 0, "flash_attention_2"),
        ("llama", Device("cuda", AMPERE, ALL), torch.float32, 0, "flex_attention"),
        ("llama", Device("cuda", AMPERE, ALL), torch.float32, 0.1, "sdpa"),
        ("qwen3", Device("cuda", HOPPER, ALL - {"flash_attention_3", "flash_attention_2"}), torch.bfloat16, 0,
         "flex_attention"),
        ("gpt2", Device("cuda", HOPPER, ALL - {"flash_attention_3", "flash_attention_2"}), torch.bfloat16, 0, "sdpa"),
        ("llama", Device("cuda", TURING, ALL), torch.float16, 0, "sdpa"),
        ("gpt_bigcode", Device("cuda", HOPPER, ALL), torch.bfloat16, 0, "sdpa"),  # not known to keep documents apart
        ("bloom", Device("cuda", HOPPER, ALL), torch.bfloat16, 0, "eager"),
    ],
)  # fmt: skip
def test_the_kernel_by_device(family: str, device: Device, dtype: torch.dtype, dropout: float, expected: str) -> None:
    model = model_of(family, dropout={"attention": dropout})
    assert kernel_for(model, device, dtype) == expected
