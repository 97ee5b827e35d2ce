"""The families of models that can be built from scratch: the class of transformers, what it allows, what it counts.

Every family is a config class of transformers with its papers' choices; nothing here is a model of our own. Counts are
in closed form and a test compares each with the model that is built. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fledge.models.architecture import Architecture

DECODER, ENCODER, BOTH = "decoder", "encoder", "encoder-decoder"
Count = Callable[[Architecture], int]
Keys = Callable[[Architecture], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """What is true of every model of a family. The first of `attention` and of `positions` is the default."""

    kind: str
    config: str
    """name of the config class in transformers"""
    model: str
    """name of the class with its language-model head"""
    attention: tuple[str, ...]
    positions: tuple[str, ...]
    keys: Keys
    """the config's keys for a shape"""
    layer: Count
    other: Count
    decoder_layer: Count = lambda a: 0
    gated: bool = False
    """a feed-forward layer of three matrices, 8/3 as wide as the model; else two, four times as wide"""
    tied: tuple[bool, ...] = (True,)
    """whether the output layer may share the embedding's weights; the first is the default"""
    free_heads: bool = False
    """whether heads · head_dim may differ from the hidden width"""
    window: bool = False
    """whether attention may be held to a window"""
    dropout: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """part of the model → the config's keys"""
    residual: tuple[str, ...] = ()
    """ends of the names of matrices that write into the residual stream and are scaled down at the start; none for
    post-norm models, and for classes that do it themselves"""


def _d(a: Architecture) -> int:
    return a.hidden


def _attention(a: Architecture, biased: bool) -> int:
    """W_Q, W_K, W_V and W_O with all of their biases, or with none."""
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    return a.hidden * (2 * q + 2 * kv) + (q + 2 * kv + a.hidden if biased else 0)


def _qkv_bias(a: Architecture) -> int:
    return a.head_dim * (a.heads + 2 * a.kv_heads)


def _plain(a: Architecture) -> int:
    """Two matrices with biases."""
    return 2 * a.hidden * a.intermediate + a.intermediate + a.hidden


def _llama_layer(a: Architecture) -> int:
    return _attention(a, biased=False) + 3 * a.hidden * a.intermediate + 2 * a.hidden


def _gpt_layer(a: Architecture) -> int:
    """Attention and feed-forward with biases, two layer norms: GPT-2's, and BERT's with the norms elsewhere."""
    return _attention(a, biased=True) + _plain(a) + 4 * a.hidden


def _cross_layer(a: Architecture) -> int:
    return _gpt_layer(a) + _attention(a, biased=True) + 2 * a.hidden


def _mlm_head(a: Architecture) -> int:
    """Dense layer, norm, and a bias for every token; the matrix to the vocabulary is the embedding."""
    return a.hidden**2 + a.hidden + 2 * a.hidden + a.vocab_size


def _electra_other(a: Architecture) -> int:
    e = a.embedding_width
    around = (a.context + 2) * e + 2 * e + (e * a.hidden + a.hidden if e != a.hidden else 0)
    if a.head == "generator":
        return around + a.hidden * e + e + 2 * e + a.vocab_size
    return around + a.hidden**2 + a.hidden + a.hidden + 1


def _deberta_other(a: Architecture) -> int:
    convolution = 3 * a.hidden**2 + a.hidden + 2 * a.hidden if a.family == "deberta-v2" else 0
    return 2 * a.hidden + 2 * _buckets(a) * a.hidden + 2 * a.hidden + convolution + _mlm_head(a)


def _buckets(a: Architecture) -> int:
    """Buckets of relative positions on either side: 256 (He et al., 2021), fewer where the context is shorter."""
    return max(2, min(256, a.context // 2))


# -- the configs -----------------------------------------------------------------------------------------------------
def _rope(a: Architecture) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": a.rope_theta, **(a.rope_scaling or {})}


def _written(a: Architecture) -> int:
    """The context as the config says it; dynamic scaling counts from the one before it."""
    scaling = a.rope_scaling or {}
    return round(a.context / scaling["factor"]) if scaling.get("rope_type") == "dynamic" else a.context


def _llama_keys(a: Architecture) -> dict[str, Any]:
    return {
        "hidden_size": a.hidden,
        "intermediate_size": a.intermediate,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "max_position_embeddings": _written(a),
        "rope_parameters": _rope(a),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": a.tie_embeddings,
    }


def _qwen_keys(a: Architecture) -> dict[str, Any]:
    window = {"use_sliding_window": True, "sliding_window": a.window, "max_window_layers": 0} if a.window else {}
    return {**_llama_keys(a), **window, "rms_norm_eps": 1e-6}


def _qwen2_keys(a: Architecture) -> dict[str, Any]:
    keys = _qwen_keys(a)
    del keys["head_dim"]
    return keys


def _glm_keys(a: Architecture) -> dict[str, Any]:
    keys = _llama_keys(a)
    keys["rope_parameters"] = {**keys["rope_parameters"], "partial_rotary_factor": 0.5}
    return {**keys, "attention_bias": True, "rms_norm_eps": 1.5625e-7}


def _gpt2_keys(a: Architecture) -> dict[str, Any]:
    return {
        "n_embd": a.hidden,
        "n_layer": a.layers,
        "n_head": a.heads,
        "n_inner": a.intermediate,
        "n_positions": a.context,
        "tie_word_embeddings": a.tie_embeddings,
    }


def _bert_keys(a: Architecture) -> dict[str, Any]:
    return {
        "hidden_size": a.hidden,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "intermediate_size": a.intermediate,
        "max_position_embeddings": a.context,
    }


def _deberta_keys(a: Architecture) -> dict[str, Any]:
    convolution = {"conv_kernel_size": 3, "conv_act": "gelu"} if a.family == "deberta-v2" else {}
    return {
        **_bert_keys(a),
        **convolution,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": _buckets(a),
        "max_relative_positions": -1,
        "position_biased_input": False,  # absolute positions enter at the end, in pre-training only
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    }


def _t5_keys(a: Architecture) -> dict[str, Any]:
    return {
        "d_model": a.hidden,
        "d_kv": a.head_dim,
        "d_ff": a.intermediate,
        "num_layers": a.layers,
        "num_decoder_layers": a.decoder_layers,
        "num_heads": a.heads,
        "n_positions": a.context,  # T5 has no limit of its own: the length it was trained on
    }


def _bart_keys(a: Architecture) -> dict[str, Any]:
    return {
        "d_model": a.hidden,
        "encoder_layers": a.layers,
        "decoder_layers": a.decoder_layers,
        "encoder_attention_heads": a.heads,
        "decoder_attention_heads": a.heads,
        "encoder_ffn_dim": a.intermediate,
        "decoder_ffn_dim": a.intermediate,
        "max_position_embeddings": a.context,
    }


_LLAMA_DROPOUT = {"attention": ("attention_dropout",)}
_BERT_DROPOUT = {
    "attention": ("attention_probs_dropout_prob",),
    "hidden": ("hidden_dropout_prob",),
    "classifier": ("classifier_dropout",),
}
_GPT2_DROPOUT = {"attention": ("attn_pdrop",), "hidden": ("resid_pdrop",), "embedding": ("embd_pdrop",)}
_BART_DROPOUT = {
    "attention": ("attention_dropout",),
    "hidden": ("dropout",),
    "activation": ("activation_dropout",),
    "classifier": ("classifier_dropout",),
}
_GROUPED = ("gqa", "mha", "mqa")
_LLAMA_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def _llama_like(config: str, keys: Keys, **other: Any) -> Family:
    """Pre-RMSNorm, rotary positions, SwiGLU (Touvron et al., 2023)."""
    given = {"attention": _GROUPED, "layer": _llama_layer, "tied": (True, False), **other}
    return Family(
        DECODER, f"{config}Config", f"{config}ForCausalLM", positions=("rope",), keys=keys, other=_d, gated=True,
        dropout=_LLAMA_DROPOUT, residual=_LLAMA_RESIDUAL, **given,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    # decoders
    "llama": _llama_like("Llama", _llama_keys, free_heads=True),
    "mistral": _llama_like(  # Jiang et al., 2023
        "Mistral", lambda a: {**_llama_keys(a), "sliding_window": a.window}, free_heads=True, window=True
    ),
    "qwen2": _llama_like(  # Yang et al., 2024: biases on queries, keys and values
        "Qwen2", _qwen2_keys, window=True, layer=lambda a: _llama_layer(a) + _qkv_bias(a)
    ),
    "qwen3": _llama_like(  # Yang et al., 2025: queries and keys are normed, a head at a time
        "Qwen3", _qwen_keys, window=True, free_heads=True, layer=lambda a: _llama_layer(a) + 2 * a.head_dim
    ),
    "glm": _llama_like(  # GLM-4 (2024): biases on queries, keys and values, half of a head rotates
        "Glm", _glm_keys, free_heads=True, layer=lambda a: _llama_layer(a) + _qkv_bias(a), tied=(False, True)
    ),
    "baichuan": _llama_like(  # Baichuan-7B (2023) is LLaMA's block with as many key heads as query heads
        "Llama", _llama_keys, attention=("mha",), tied=(False, True)
    ),
    "gpt2": Family(  # Radford et al., 2019
        DECODER, "GPT2Config", "GPT2LMHeadModel", ("mha",), ("learned",), _gpt2_keys,
        _gpt_layer, lambda a: a.context * a.hidden + 2 * a.hidden, tied=(True, False), dropout=_GPT2_DROPOUT,
    ),
    "gpt_bigcode": Family(  # StarCoder (Li et al., 2023): GPT-2 with one key head
        DECODER, "GPTBigCodeConfig", "GPTBigCodeForCausalLM", ("mqa",), ("learned",),
        lambda a: {**_gpt2_keys(a), "multi_query": True},
        _gpt_layer, lambda a: a.context * a.hidden + 2 * a.hidden, tied=(True, False), dropout=_GPT2_DROPOUT,
    ),
    "bloom": Family(  # Le Scao et al., 2022
        DECODER, "BloomConfig", "BloomForCausalLM", ("mha",), ("alibi",),
        lambda a: {"hidden_size": a.hidden, "n_layer": a.layers, "n_head": a.heads, "seq_length": a.context,
                   "tie_word_embeddings": a.tie_embeddings},
        _gpt_layer, lambda a: 4 * a.hidden, tied=(True, False),
        dropout={"attention": ("attention_dropout",), "hidden": ("hidden_dropout",)},
        residual=("self_attention.dense.weight", "dense_4h_to_h.weight"),
    ),
    "xglm": Family(  # Lin et al., 2022: a decoder with the sinusoids of Vaswani et al., 2017
        DECODER, "XGLMConfig", "XGLMForCausalLM", ("mha",), ("sinusoidal",),
        lambda a: {"d_model": a.hidden, "ffn_dim": a.intermediate, "num_layers": a.layers, "attention_heads": a.heads,
                   "max_position_embeddings": a.context, "tie_word_embeddings": a.tie_embeddings},
        _gpt_layer, lambda a: 2 * a.hidden, tied=(True, False),
        dropout={"attention": ("attention_dropout",), "hidden": ("dropout",), "activation": ("activation_dropout",)},
        residual=("out_proj.weight", "fc2.weight"),
    ),
    # encoders
    "bert": Family(  # Devlin et al., 2019
        ENCODER, "BertConfig", "BertForMaskedLM", ("mha",), ("learned",), _bert_keys,
        _gpt_layer, lambda a: (a.context + 2) * a.hidden + 2 * a.hidden + _mlm_head(a), dropout=_BERT_DROPOUT,
    ),
    "roberta": Family(  # Liu et al., 2019: positions are counted from the padding id on; no second segment
        ENCODER, "RobertaConfig", "RobertaForMaskedLM", ("mha",), ("learned",),
        lambda a: {**_bert_keys(a), "max_position_embeddings": a.context + a.pad_id + 1, "type_vocab_size": 1,
                   "layer_norm_eps": 1e-5},
        _gpt_layer, lambda a: (a.context + a.pad_id + 2) * a.hidden + 2 * a.hidden + _mlm_head(a),
        dropout=_BERT_DROPOUT,
    ),
    "electra": Family(  # Clark et al., 2020
        ENCODER, "ElectraConfig", "ElectraForPreTraining", ("mha",), ("learned",),
        lambda a: {**_bert_keys(a), "embedding_size": a.embedding_width},
        _gpt_layer, _electra_other,
        dropout={**_BERT_DROPOUT, "classifier": ("classifier_dropout", "summary_last_dropout")},
    ),
    "deberta-v2": Family(  # He et al., 2021: disentangled attention, and a convolution beside the first layer
        ENCODER, "DebertaV2Config", "DebertaV2ForMaskedLM", ("mha",), ("relative",), _deberta_keys,
        _gpt_layer, _deberta_other,
        dropout={**_BERT_DROPOUT, "classifier": ("cls_dropout",), "pooler": ("pooler_dropout",)},
    ),
    "deberta-v3": Family(  # He et al., 2023: the same without the convolution, pre-trained as ELECTRA is
        ENCODER, "DebertaV2Config", "DebertaV2ForMaskedLM", ("mha",), ("relative",), _deberta_keys,
        _gpt_layer, _deberta_other,
        dropout={**_BERT_DROPOUT, "classifier": ("cls_dropout",), "pooler": ("pooler_dropout",)},
    ),
    # encoder-decoders
    "t5": Family(  # Raffel et al., 2020: no biases, 32 buckets of relative positions a head, in the first layers
        BOTH, "T5Config", "T5ForConditionalGeneration", ("mha",), ("relative",), _t5_keys,
        lambda a: _attention(a, biased=False) + 2 * a.hidden * a.intermediate + 2 * a.hidden,
        lambda a: 2 * a.hidden + 2 * 32 * a.heads,
        lambda a: 2 * _attention(a, biased=False) + 2 * a.hidden * a.intermediate + 3 * a.hidden,
        free_heads=True, dropout={"hidden": ("dropout_rate",), "classifier": ("classifier_dropout",)},
    ),
    "bart": Family(  # Lewis et al., 2020
        BOTH, "BartConfig", "BartForConditionalGeneration", ("mha",), ("learned",), _bart_keys,
        _gpt_layer, lambda a: 2 * (a.context + 2) * a.hidden + 4 * a.hidden, _cross_layer, dropout=_BART_DROPOUT,
    ),
}  # fmt: skip

CHOICE: dict[str, tuple[str, ...]] = {
    DECODER: ("llama", "mistral", "gpt2", "gpt_bigcode", "bloom", "xglm"),
    ENCODER: ("bert", "deberta-v3"),
    BOTH: ("t5", "bart"),
}
"""Where a recipe names no family: the first of its kind that has the attention and the positions asked for."""

SLIDING = "sliding"


def takes(family: Family, attention: str | None, positions: str | None, window: bool) -> bool:
    """Whether a family has such attention and such positions."""
    grouped = attention if attention != SLIDING else None
    return (
        (grouped is None or grouped in family.attention)
        and (positions is None or positions in family.positions)
        and (family.window or not window)
    )


def kinds_of(kind: str) -> list[str]:
    """What can be built in a kind of model: `llama: gqa/mha/mqa, rope` and so on."""
    found = []
    for name in CHOICE[kind]:
        family = FAMILIES[name]
        attention = [*family.attention, *([SLIDING] if family.window else [])]
        found.append(f"{'/'.join(attention)} + {'/'.join(family.positions)} ({name})")
    return found
