"""The forward pass of a step: equal to transformers, and to the bit the same alone, in a batch, whole or in pieces."""

from __future__ import annotations

import copy
import os
import platform
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fledge.core.errors import FledgeError
from fledge.inference import fusion, kernels, program, weights
from fledge.inference.formats import Weights
from fledge.inference.forward import Forward
from fledge.inference.fusion import FusedLayer
from fledge.inference.kernel_step import KernelStep
from fledge.inference.paged import BLOCK, GroupedStep
from fledge.inference.step import Part
from tests.inference.tiny import llama

IN_TILES = pytest.mark.skipif(
    not program.multiplies(torch.bfloat16, torch.device("cpu")),
    reason="this processor has no AVX-512, or no Numba is here",
)

SHAPE = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256,
)  # fmt: skip
COMMON = dict(vocab_size=330, bos_token_id=None, eos_token_id=None, pad_token_id=3, initializer_range=0.3)
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SHAPE),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, SHAPE | {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, SHAPE | {"sliding_window": 24}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, SHAPE | {"head_dim": 16, "sliding_window": 24}),
    "glm": (GlmForCausalLM, GlmConfig, SHAPE | {"head_dim": 16}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, dict(n_embd=64, n_layer=2, n_head=4, n_positions=256)),
    "bloom": (BloomForCausalLM, BloomConfig, dict(hidden_size=64, n_layer=2, n_head=4)),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, word_embed_proj_dim=64),
    ),
}
PROMPTS = [[(7 * i + j) % 330 for i in range(n)] for j, n in enumerate((5, 37, 140, 1))]
NEW = 12


def made(family: str) -> Any:
    if family == "llama":
        return llama()
    kind, config, shape = FAMILIES[family]
    torch.manual_seed(0)
    return kind(config(**COMMON, **shape)).eval()


def together(forward: Forward) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy answers to all prompts in one batch, and the logits (NEW, V) that they come from."""
    forward.allocate(60)
    tables = [list(range(n * 12, n * 12 + 12))[::-1] for n in range(4)]  # the blocks of a text need not be in order
    answers: list[list[int]] = [[] for _ in PROMPTS]
    rows: list[list[Tensor]] = [[] for _ in PROMPTS]
    parts = [Part(list(prompt), 0, table) for prompt, table in zip(PROMPTS, tables, strict=True)]
    for step in range(NEW):
        logits = forward.run(parts)
        for n, row in enumerate(logits):
            answers[n].append(int(row.argmax()))
            rows[n].append(row)
        parts = [Part([answers[n][-1]], len(PROMPTS[n]) + step, tables[n]) for n in range(4)]
    return answers, [torch.stack(each) for each in rows]


def in_pieces(forward: Forward, n: int, answer: list[int]) -> Tensor:
    """The same logits (NEW, V) of one text alone, read in pieces of odd lengths, as after a preemption."""
    ids, chance, place = PROMPTS[n] + answer, random.Random(n), 0
    table = list(range((n + 1) % 4 * 12, (n + 1) % 4 * 12 + 12))
    found = []
    while place < len(ids) - 1:
        count = min(chance.choice([1, 2, 3, 5, 17, 33, 64]), len(ids) - 1 - place)
        found.append(forward.run([Part(ids[place : place + count], place, table, count)]))
        place += count
    return torch.cat(found)[len(PROMPTS[n]) - 1 :]


@pytest.mark.parametrize("way", ["libraries", "tiles", "compiled"])
@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_a_step_says_what_transformers_says_to_the_bit_the_same_in_any_company(
    family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "libraries":  # as on a processor without AVX-512
        monkeypatch.setattr(weights, "in_tiles", lambda weights: False)
    model, loops = made(family), way == "compiled"
    reference = copy.deepcopy(model)
    forward = Forward(model, loops=loops)
    assert forward._step is (KernelStep if loops and kernels.available(model.dtype, model.device) else GroupedStep)
    answers, rows = together(forward)
    for n, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                pad_token_id=3,
            )[0]  # fmt: skip
            logits = reference(whole[None]).logits[0, len(prompt) - 1 : -1]
        assert answer == whole[len(prompt) :].tolist()
        assert torch.allclose(rows[n], logits, atol=1e-4)
        assert torch.equal(rows[n], in_pieces(forward, n, answer))


@IN_TILES
@pytest.mark.parametrize("weights", ["", "int8", "int4"])
def test_in_bf16_too_the_bits_are_the_same_in_any_company(weights: Weights) -> None:
    forward = Forward(llama().bfloat16(), weights=weights, loops=True)
    assert forward._stack is not None
    answers, rows = together(forward)
    for n, answer in enumerate(answers):
        assert torch.equal(rows[n], in_pieces(forward, n, answer))


@IN_TILES
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_whole_is_one_program_and_says_what_the_modules_say(family: str) -> None:
    forward = Forward(made(family), loops=True)
    assert forward._stack is not None
    answers, rows = together(forward)
    forward._stack = None
    again, expected = together(forward)
    assert answers == again
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(rows, expected, strict=True))


@IN_TILES
def test_a_whole_that_a_new_version_computes_otherwise_is_computed_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    monkeypatch.setattr(type(model.model), "forward", _scaled(type(model.model).forward))
    expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    forward = Forward(model, loops=True)
    assert forward._stack is None and "layer by layer" in caplog.text
    forward.allocate(4)
    assert torch.allclose(forward.run([Part(PROMPTS[0], 0, [2])])[0], expected, atol=1e-4)


def _scaled(forward: Any) -> Any:
    def scaled(self: Any, *args: Any, **more: Any) -> Any:
        found = forward(self, *args, **more)
        found.last_hidden_state = found.last_hidden_state * 1.01
        return found

    return scaled


@pytest.mark.nightly  # it compiles anew for another processor
def test_without_avx_512_the_loops_compute_what_the_libraries_do_not() -> None:
    """In a process of its own: Numba chooses the processor when it starts."""
    if not kernels.available(torch.float32, torch.device("cpu")) or platform.machine() != "x86_64":
        pytest.skip("no compiled loops here, or no x86 processor")
    code = """if True:
        import torch
        from fledge.inference.forward import Forward
        from fledge.inference.kernel_step import KernelStep
        from tests.inference.test_forward import PROMPTS, in_pieces, llama, together
        reference, forward = llama(), Forward(llama(), loops=True)
        assert forward._step is KernelStep and forward._stack is None
        answers, rows = together(forward)
        for n, answer in enumerate(answers):
            with torch.no_grad():
                logits = reference(torch.tensor([PROMPTS[n] + answer])).logits[0, len(PROMPTS[n]) - 1 : -1]
            assert torch.allclose(rows[n], logits, atol=1e-4)
            assert torch.equal(rows[n], in_pieces(forward, n, answer))
        """
    old = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse,+sse2,+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+popcnt"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | old, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_layers_that_are_known_are_fused_and_others_are_not() -> None:
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        model = made(family)
        Forward(model)
        assert all(isinstance(layer, FusedLayer) for layer in model.model.layers)
    model = made("gemma2")
    Forward(model)
    assert not any(isinstance(module, FusedLayer) for module in model.modules())


def test_a_layer_that_a_new_version_computes_otherwise_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    layer = type(model.model.layers[0])
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x, **more: plain(self, x, **more) * 1.01)
    expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    forward = Forward(model)
    assert not any(isinstance(module, FusedLayer) for module in model.modules())
    forward.allocate(4)
    assert torch.allclose(forward.run([Part(PROMPTS[0], 0, [2])])[0], expected, atol=1e-4)


@pytest.mark.parametrize("loops", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_in_8_bits_stay_near(dtype: torch.dtype, loops: bool) -> None:
    model = llama(initializer_range=0.1).to(dtype)
    expected = model(torch.tensor([PROMPTS[1]])).logits[0].float()
    forward = Forward(copy.deepcopy(model), weights="int8", loops=loops)
    forward.allocate(8)
    found = forward.run([Part(PROMPTS[1], 0, list(range(4)), len(PROMPTS[1]))])
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < (0.03 if dtype == torch.float32 else 0.04)
    alone = torch.cat([forward.run([Part([id], place, [4, 5, 6])]) for place, id in enumerate(PROMPTS[1])])
    assert torch.equal(found, alone) if dtype == torch.float32 else torch.allclose(found, alone, atol=0.05)


def test_what_is_no_number_stays_with_its_text() -> None:
    model = llama()
    forward = Forward(model)
    forward.allocate(12)
    clean = forward.run([Part(PROMPTS[1], 0, [0, 1, 2])])
    forward.kv.layers[0][:, :, 5 + 1] = float("nan")
    assert forward.run([Part(PROMPTS[1][:20], 0, [4, 5])]).isfinite().all() == (GroupedStep is not forward._step)
    forward.clear([5])
    assert forward.run([Part(PROMPTS[1][:20], 0, [4, 5])]).isfinite().all()
    assert torch.equal(forward.run([Part(PROMPTS[1], 0, [6, 7, 8])]), clean)


def test_a_block_is_copied_and_more_blocks_keep_what_is_there() -> None:
    forward = Forward(llama())
    forward.allocate(3)
    ids = PROMPTS[2][: BLOCK + 4]
    forward.run([Part(ids[:-1], 0, [0, 1])])
    forward.allocate(9)
    forward.copy(1, 7)
    assert torch.equal(forward.run([Part(ids[-1:], len(ids) - 1, [0, 7])]), forward.run([Part(ids, 0, [4, 5])]))


def test_rope_that_depends_on_the_longest_text_is_read_text_by_text() -> None:
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0})
    reference = copy.deepcopy(model)
    forward = Forward(model)
    forward.allocate(20)
    rows = forward.run([Part(prompt, 0, list(range(n * 10, n * 10 + 10))) for n, prompt in enumerate(PROMPTS[:2])])
    for row, prompt in zip(rows, PROMPTS, strict=False):
        assert torch.allclose(row, reference(torch.tensor([prompt])).logits[0, -1], atol=1e-4)


def test_a_model_that_keeps_more_than_keys_and_values_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(FledgeError, match="decoder-only"):
        Forward(model)


def test_fusing_counts_only_plain_layers() -> None:
    model = llama()
    model.model.layers[1].self_attn.q_proj = torch.nn.Sequential(model.model.layers[1].self_attn.q_proj)
    assert fusion._fuse_layers(model, lambda sources: sources[0]) == 0
