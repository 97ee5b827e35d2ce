"""A transformer in numbers: what memory and operations follow from. From a shape, from a `config.json`, or by name.

Closed forms, equal to what the built models have (a test builds some of them):

    LLaMA's kind   L · [2·d·d_head·(n_heads + n_kv) + 3·d·f + 2d] + d + V·d (twice V·d when untied)
    GPT-2's kind   L · (12d² + 13d) + V·d + context·d + 2d, with f = 4d

Nothing heavy is imported: the plan reads this before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.models.architecture import Architecture
from fledge.models.shape import ModelShape

_LLAMA = ("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen3", "phi3", "glm", "glm4", "olmo2", "granite")
GATED = frozenset({*_LLAMA, "gemma", "gemma2", "gemma3", "gemma3_text", "baichuan", "internlm2", "cohere", "smollm3"})
"""`model_type`s whose feed-forward layer has three matrices (SwiGLU, GeGLU)."""
MODEL_TYPES = {"baichuan": "llama", "deberta-v3": "deberta-v2"}
"""Families of `models.families` whose class has another name in transformers."""
PACKAGED_VOCABULARY = 32_000  # where a size is given and no vocabulary


@dataclass(frozen=True)
class Network:
    """A decoder, an encoder or both: layers alike, `heads` of `head_dim`, a feed-forward layer `intermediate` wide."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    """three feed-forward matrices, RMSNorm and no biases (LLaMA); else two, LayerNorm and biases (GPT-2)"""
    positions: int = 0
    """rows of a learned position table"""
    tied: bool = True
    qkv_bias: bool = False
    """biases of Q, K and V beside LLaMA's shape (Qwen2)"""
    qk_norm: bool = False
    """a norm of each head's Q and K (Qwen3)"""
    decoder_layers: int = 0
    """of an encoder-decoder: the decoder's, each with a second attention to what the encoder has read"""
    family: str = "llama"
    """the `model_type` of transformers, by which a layer keeps more or less"""
    exact_scores: float = 0.0
    """bytes that attention on a CPU keeps of a head for every query and key: see `exact_scores`"""
    counted: int = 0
    """parameters as counted in the model itself or said by the user; 0: what the closed form gives"""

    @property
    def attention_width(self) -> int:
        """n_heads · d_head."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """n_kv · d_head."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's matrices: those that multiply."""
        attention = 2 * self.hidden * (self.attention_width + self.kv_width)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """One layer with its norms and biases."""
        if self.gated:
            biases = (self.attention_width + 2 * self.kv_width) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
            return self.layer_matrices + biases + 2 * self.hidden
        biases = self.attention_width + 2 * self.kv_width + self.hidden + self.intermediate + self.hidden
        return self.layer_matrices + biases + 4 * self.hidden

    @property
    def cross_matrices(self) -> int:
        """Parameters of the matrices with which a decoder's layer looks at what the encoder has read."""
        return 2 * self.hidden * (self.attention_width + self.kv_width)

    @property
    def embedding_parameters(self) -> int:
        """The tables that are looked up, and the output layer where it is not tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.positions * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        layers = self.layers * self.layer_parameters
        layers += self.decoder_layers * (self.layer_parameters + self.cross_matrices)
        return self.counted or layers + self.embedding_parameters + self.hidden * (2 - self.gated)

    @property
    def matrices(self) -> int:
        """Parameters inside the layers' matrices: what Muon trains, what LoRA adapts, what autocast copies."""
        closed = replace(self, counted=0).parameters
        inner = (self.layers + self.decoder_layers) * self.layer_matrices + self.decoder_layers * self.cross_matrices
        return round(inner * self.parameters / closed)

    @property
    def multiplying(self) -> int:
        """Parameters that multiply for every token: the layers and the output layer; a look-up multiplies nothing."""
        return self.matrices + self.vocabulary * self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a low-rank adapter on all linear layers: Σ r · (d + k)."""
        d, q, kv, f = self.hidden, self.attention_width, self.kv_width, self.intermediate
        shapes = [(d, q), (q, d), (d, kv), (d, kv), *([(d, f)] * (2 if self.gated else 1)), (f, d)]
        cross = [(d, q), (q, d), (d, kv), (d, kv)]
        a_layer, beside = (sum(rank * (a + b) for a, b in pairs) for pairs in (shapes, cross))
        return (self.layers + self.decoder_layers) * a_layer + self.decoder_layers * beside

    def kv_cache_bytes(self, tokens: float, rows: int = 1, width: float = 2) -> float:
        """Keys and values kept while text is written: 2 · L · n_kv · d_head · tokens · rows · bytes a number."""
        layers = 2 * self.decoder_layers or self.layers  # a decoder beside an encoder keeps those of both attentions
        return 2 * layers * self.kv_width * tokens * rows * width

    @classmethod
    def of_shape(cls, shape: Architecture) -> Network:
        """From an architecture of any family."""
        family = MODEL_TYPES.get(shape.family, shape.family)
        dropped = shape.dropout.get("hidden" if family == "t5" else "attention")
        learned = shape.positions in ("learned", "sinusoidal")
        return cls(
            layers=shape.layers, hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads,
            head_dim=shape.head_dim, intermediate=shape.intermediate, vocabulary=shape.vocab_size,
            gated=shape.about.gated, positions=shape.context if learned else 0, tied=shape.tie_embeddings,
            counted=shape.parameters, decoder_layers=shape.decoder_layers, family=family,
            exact_scores=exact_scores(family, dropped),
        )  # fmt: skip

    @classmethod
    def of_size(cls, parameters: float, vocabulary: int = PACKAGED_VOCABULARY) -> Network:
        """The LLaMA shape nearest to a size; it counts as many parameters as were asked for."""
        large = parameters >= 1e9
        found = ModelShape(size=round(parameters), attention="mha", tie_embeddings=not large)
        shape = found.resolve(vocabulary)
        return replace(cls.of_shape(shape), counted=round(parameters))

    @classmethod
    def of_config(cls, config: Mapping[str, Any], counted: int = 0) -> Network:
        """From what a `config.json` says, in the words of any of transformers' families."""

        def first(*names: str) -> Any:
            return next((config[name] for name in names if config.get(name) is not None), None)

        if isinstance(config.get("text_config"), Mapping):
            return cls.of_config(config["text_config"], counted)
        kind = str(config.get("model_type", "llama"))
        hidden = first("hidden_size", "n_embd", "d_model", "dim")
        layers = first("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
        heads = first(
            "num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "encoder_attention_heads"
        )
        vocabulary = first("vocab_size")
        if not (hidden and layers and heads and vocabulary):
            raise FledgeError(
                Problem(
                    t("the shape of the model cannot be read from its config.json"),
                    found=kind,
                    allowed="hidden_size, num_hidden_layers, num_attention_heads, vocab_size",
                )
            )
        gated = kind in GATED or str(config.get("feed_forward_proj", "")).startswith("gated")
        context = first("max_position_embeddings", "n_positions") or 0
        learned = kind in ("gpt2", "bert", "roberta", "electra", "bart", "opt", "gpt_neo")
        return cls(
            layers=int(layers), decoder_layers=_decoder_layers(config, int(layers)), family=kind,
            exact_scores=exact_scores(kind, first("attention_probs_dropout_prob", "attention_dropout", "dropout_rate")),
            hidden=int(hidden), heads=int(heads), kv_heads=int(first("num_key_value_heads") or heads),
            head_dim=int(first("head_dim", "d_kv") or hidden // heads),
            intermediate=int(first("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim") or 4 * hidden),
            vocabulary=int(vocabulary), gated=gated, positions=int(context) if learned else 0,
            tied=bool(config.get("tie_word_embeddings", kind != "llama")),
            qkv_bias=kind == "qwen2" or bool(config.get("attention_bias")), qk_norm=kind == "qwen3", counted=counted,
        )  # fmt: skip

    @classmethod
    def named(cls, name: str) -> Network:
        """A published shape by name, or a model folder."""
        if name.lower() in KNOWN:
            return KNOWN[name.lower()]
        config = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        if config.is_file() and config.suffix == ".json":
            return cls.of_config(json.loads(config.read_text(encoding="utf-8")))
        raise FledgeError(
            Problem(
                t('"{name}" is neither a model folder nor a shape that is known', name=name),
                allowed=listing(list(KNOWN), 20),
                fix=did_you_mean(name, KNOWN),
            )
        )


def exact_scores(family: str, dropout: float | None) -> float:
    """Bytes that attention on a CPU keeps of a head for every query and key; `dropout` None: the family's own.

    None where no probability is dropped out, as the kernel then holds a block of them at a time; else the
    probabilities in fp32, the mask, and those that are left. T5 learns a bias of the scores, and DeBERTa's are sums of
    three, with the places from which two are gathered.
    """
    if family.startswith("deberta"):
        return 22.0
    if family in ("t5", "mt5", "umt5"):
        return 4.0 if dropout == 0 else 12.0
    usual = 0.1 if family in ("bert", "roberta", "xlm-roberta", "camembert", "electra") else 0.0
    return 12.0 if (usual if dropout is None else dropout) else 0.0


def _decoder_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers of the decoder beside an encoder."""
    if not config.get("is_encoder_decoder"):
        return 0
    return int(config.get("num_decoder_layers") or config.get("decoder_layers") or layers)


def _llama(
    layers: int, hidden: int, heads: int, kv: int, intermediate: int, vocabulary: int, tied: bool = False, **rest: bool
) -> Network:
    return Network(layers, hidden, heads, kv, hidden // heads, intermediate, vocabulary, True, 0, tied, **rest)


def _gpt(layers: int, hidden: int, heads: int, context: int) -> Network:
    return Network(layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50_257, False, context)


KNOWN = {
    "gpt2": _gpt(12, 768, 12, 1024),
    "gpt2-xl": _gpt(48, 1600, 25, 1024),
    "gpt3": _gpt(96, 12_288, 96, 2048),
    "llama-7b": _llama(32, 4096, 32, 32, 11_008, 32_000),
    "llama-13b": _llama(40, 5120, 40, 40, 13_824, 32_000),
    "llama-2-70b": _llama(80, 8192, 64, 8, 28_672, 32_000),
    "llama-3-8b": _llama(32, 4096, 32, 8, 14_336, 128_256),
    "mistral-7b": _llama(32, 4096, 32, 8, 14_336, 32_000),
    "qwen2-7b": _llama(28, 3584, 28, 4, 18_944, 152_064, qkv_bias=True),
    "smollm2-135m": _llama(30, 576, 9, 3, 1536, 49_152, tied=True),
}
"""Published shapes (their papers and `config.json`s)."""
