"""Where the parts of a decoder are, by family: what tensor and pipeline layouts need to know. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The names of a decoder's parts, below its body, or below a layer.

    A *column* module's outputs are divided among the processes of a tensor layout (`parts` of it each for itself: a
    fused query, key and value matrix has three), a *row* module's inputs; *norms* see a piece of the sequence.
    """

    layers: str
    embedding: str
    final_norm: str
    attention: str
    feed_forward: str
    columns: tuple[tuple[str, int], ...]
    rows: tuple[str, ...]
    norms: tuple[str, ...]
    inner_norms: tuple[str, ...] = ()
    """norms of single heads, where there are any"""
    positions: str = ""
    """learned positions, added to the embedding"""


_LLAMA = Family(
    layers="layers",
    embedding="embed_tokens",
    final_norm="norm",
    attention="self_attn",
    feed_forward="mlp",
    columns=tuple(
        (name, 1)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    ),
    rows=("self_attn.o_proj", "mlp.down_proj"),
    norms=("input_layernorm", "post_attention_layernorm"),
    inner_norms=("self_attn.q_norm", "self_attn.k_norm"),
)
_GPT2 = Family(
    layers="h",
    embedding="wte",
    final_norm="ln_f",
    attention="attn",
    feed_forward="mlp",
    columns=(("attn.c_attn", 3), ("mlp.c_fc", 1)),
    rows=("attn.c_proj", "mlp.c_proj"),
    norms=("ln_1", "ln_2"),
    positions="wpe",
)
FAMILIES = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "mistral": _LLAMA, "gpt2": _GPT2}
"""By `model_type` of config.json."""
