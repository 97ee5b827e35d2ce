"""A model from scratch: a transformers config made from a shape, and seeded weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from fledge.models.shape import Architecture


def llama_config(shape: Architecture, tokenizer: PreTrainedTokenizerBase | None = None) -> LlamaConfig:
    """The transformers config of `shape`; the special tokens' ids come from the tokenizer."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
    )


def build_model(
    shape: Architecture, seed: int, tokenizer: PreTrainedTokenizerBase | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """A fresh fp32 model of `shape`: the same seed gives the same weights, and nobody else's random state moves.

    Matrices are normal with deviation 0.02; those that write into the residual stream are scaled by 1/√(2 · layers)
    (Radford et al., 2019), so that its variance does not grow with depth.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama_config(shape, tokenizer))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * shape.layers) ** -0.5)
    return model.to(device)
