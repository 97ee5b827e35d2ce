"""Which parameters an optimiser decays, orthogonalises or keeps in 8 bits, for every family; and 8-bit moments."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fledge.core.errors import FledgeError
from fledge.core.events import Emitter
from fledge.training.checkpoints.state import RunState
from fledge.training.checkpoints.store import Checkpoints
from fledge.training.optimization import eight_bit
from fledge.training.optimization.optimizer import build_optimizers
from tests.training.test_trainer import Killed, KillingSource, trainer, weights
from tests.training.toys import settings, tiny

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 61}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64},
    "llama": SMALL,
    "qwen3": {**SMALL, "head_dim": 8, "num_key_value_heads": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61},
    "bert": {**SMALL, "max_position_embeddings": 64},
    "roberta": {**SMALL, "max_position_embeddings": 64},
    "electra": {**SMALL, "embedding_size": 16, "max_position_embeddings": 64},
    "deberta-v2": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61},
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 61,
        "max_position_embeddings": 64,
    },
    "glm": {**SMALL, "head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0},
}  # fmt: skip


def family(name: str) -> Any:
    config = AutoConfig.for_model(name, **FAMILIES[name])
    causal = name in ("gpt2", "llama", "qwen3", "bloom", "glm")
    return (AutoModelForCausalLM if causal else AutoModel).from_config(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_matrices_alone_are_decayed_in_every_family(name: str) -> None:
    """The reference is written from the modules' kinds, not from the parameters' shapes."""
    from transformers.pytorch_utils import Conv1D

    model = family(name)
    head = model.get_output_embeddings()
    expected = {
        f"{where}.weight"
        for where, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    decayed, still = set(), set()
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    for optimizer in build_optimizers([model], settings(weight_decay=0.1)):
        for group in optimizer.param_groups:
            (decayed if group["weight_decay"] else still).update(names[id(p)] for p in group["params"])
    assert decayed == expected and len(expected) >= 8
    assert decayed | still == set(names.values()) and not decayed & still
    muons = build_optimizers([model], settings(optimizer="muon"))
    inner = {names[id(p)] for muon in muons[:-1] for group in muon.param_groups for p in group["params"]}
    assert inner == expected and type(muons[-1]) is torch.optim.AdamW


def test_muon_takes_gpt2s_matrices_apart() -> None:
    """As torch's Muon does with query, key and value each by itself, the way a linear layer stores them."""
    model = family("gpt2")
    fused, adamw = build_optimizers([model], settings(optimizer="muon", weight_decay=0.1, muon_lr=0.02))
    attention, mlp = model.transformer.h[0].attn.c_attn.weight, model.transformer.h[0].mlp.c_fc.weight
    separate = [nn.Parameter(part.T.clone()) for part in (*attention.detach().chunk(3, dim=1), mlp.detach())]
    reference = torch.optim.Muon(separate, lr=0.02, weight_decay=0.1, momentum=0.95)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for mine, whole in zip(separate, (*attention.grad.chunk(3, dim=1), mlp.grad), strict=True):
            mine.grad = whole.T.clone()
        for optimizer in (fused, adamw, reference):
            optimizer.step()
    found = [*attention.detach().chunk(3, dim=1), mlp.detach()]
    for mine, part in zip(separate, found, strict=True):
        torch.testing.assert_close(part.T, mine.detach(), rtol=1e-5, atol=1e-6)


# --- 8 bits ----------------------------------------------------------------------------------------------------------


def wide() -> Any:
    return tiny(hidden=64)  # its matrices have 4,096 numbers and more


def test_the_losses_of_8_bits_follow_those_of_32_and_memory_is_saved(events: Emitter) -> None:
    losses, sizes = {}, {}
    for name in ("adamw", "adamw8bit"):
        model = wide()
        losses[name] = trainer(model, events, steps=60, optimizer=name, lr=1e-2).fit()["final_loss"]
        model = wide()
        made = build_optimizers([model], settings(optimizer=name))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for optimizer in made:
            optimizer.step()
        state = RunState(dict(model.named_parameters()), made)
        sizes[name] = sum(t.nbytes for key, t in state.tensors().items() if "layers." in key and key.startswith("opt"))
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.03)
    assert sizes["adamw8bit"] < 0.36 * sizes["adamw"]


def test_8_bits_resume_bit_for_bit(tmp_path: Path, events: Emitter) -> None:
    options: dict[str, Any] = {"steps": 7, "optimizer": "adamw8bit", "checkpoint_every": 2}
    whole, resumed = wide(), wide()
    trainer(whole, events, **options).fit()
    with pytest.raises(Killed):
        trainer(wide(), events, source=KillingSource(5), folder=tmp_path, **options).fit()
    trainer(resumed, events, folder=tmp_path, **options).fit()
    assert weights(resumed) == weights(whole)
    table = json.loads(Checkpoints(tmp_path).place.manifest("step-00000006"))["tensors"]
    kinds = {entry["dtype"] for name, entry in table.items() if name.startswith("optimizer.state1")}
    assert kinds == {"uint8", "float32"}, "small matrices keep their moments in 32 bits"


@pytest.fixture
def asked_anew() -> Iterator[None]:
    eight_bit._why_not.cache_clear()
    yield
    eight_bit._why_not.cache_clear()


def test_where_8_bits_do_not_run_they_are_refused(monkeypatch: pytest.MonkeyPatch, asked_anew: None) -> None:
    import bitsandbytes

    def broken(self: Any, *rest: Any) -> None:
        raise NotImplementedError("no kernel for this back end")

    with monkeypatch.context() as patched:
        patched.setattr(bitsandbytes.optim.AdamW8bit, "step", broken)
        with pytest.raises(FledgeError, match=r"do not run on this device(.|\n)*no kernel for this back end"):
            build_optimizers([wide()], settings(optimizer="adamw8bit"))
    eight_bit._why_not.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FledgeError, match=r"fledge-llm\[optim\]"):
        build_optimizers([wide()], settings(optimizer="adamw8bit"))


def test_a_recipe_that_needs_the_extra_says_so_before_anything_starts() -> None:
    assert settings(optimizer="adamw8bit").extras == {"bitsandbytes": "optim"}
    assert settings().extras == {}
