"""What autograd keeps of the layers until the backward pass, read off transformers' layers. A test compares it with
what PyTorch really saves.

Korthikanti et al. (2022) give s·b·h·(34 + 5·a·s/h) bytes a layer for Megatron's GPT in fp16: `megatron_activations`.
The attention scores in it are gone with SDPA and FlashAttention, and a SwiGLU layer keeps other tensors than a GELU
layer.
"""

from __future__ import annotations

import math

from fledge.training.estimation.plan import COMPUTE, Plan

_POST_NORM, _T5 = (2, 6, 2), (4, 7, 3)
LAYERS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2", "bart"), _POST_NORM),
    "t5": _T5, "mt5": _T5, "umt5": _T5,
}  # fmt: skip
"""`model_type` → what a layer keeps: tensors as wide as the model in the format of the residual stream, such tensors in
the format of the arithmetic (dropout's included), and tensors as wide as the inner layer."""


def activations_per_token(plan: Plan, decoder: bool = False) -> float:
    """Bytes that autograd keeps of one layer for one token, on one device without checkpointing; with `decoder`, of a
    layer that also looks at what an encoder has read.

    Read off transformers' layers: inputs of norms and of matrices, Q, K, V, what the gate multiplies. Under autocast
    each matrix has a 16-bit copy of its input; compiled layers keep each once and compute the rest again.
    """
    network = plan.network
    d, q, kv, f = network.hidden, network.attention_width, network.kv_width, network.intermediate
    c = COMPUTE[plan.precision]
    residual = _residual(plan)
    length = plan.decoded if decoder else plan.sequence
    keys = q + (q if network.kv_heads > 1 else kv) if plan.masked else 2 * kv  # heads are repeated under a mask
    small = 4 * network.heads + 8 + c * length * plan.masked
    if network.family in LAYERS:
        kept = _of_encoder(plan, length) + decoder * (_of_cross_attention(plan) + small)
    elif plan.compiled:
        norms, ups = (2, 3 if network.gated else 2)
        kept = residual * d + norms * c * d + c * (3 * q + keys - (0 if network.gated else q)) + ups * c * f
    elif network.gated:
        norms = 4 if residual == 4 and not plan.lora_rank else 2  # a frozen norm keeps its input only
        inputs = 5 if plan.precision == "autocast" and not plan.lora_rank else 2
        kept = norms * 4 * d + inputs * c * d + c * (2 * q + keys) + 4 * c * f
    else:
        kept = 2 * residual * d + 2 * c * d + c * (2 * q + keys) + 5 * c * f
    if plan.lora_rank:
        kept += 7 * c * plan.lora_rank
    return kept + small


def _residual(plan: Plan) -> int:
    """Bytes a number of the residual stream."""
    exact = plan.precision in ("fp32", "autocast") and not plan.lora_rank
    return 4 if exact else COMPUTE[plan.precision]


def _of_encoder(plan: Plan, length: int) -> float:
    """Bytes a token of a layer of BERT's kind or T5's, dropout included."""
    network, c = plan.network, COMPUTE[plan.precision]
    wide, narrow, inner = LAYERS[network.family]
    attended = 2 * network.attention_width + 2 * network.kv_width
    kept = wide * _residual(plan) * network.hidden + narrow * c * network.hidden + c * attended
    kept += c * network.intermediate * (8 if network.gated else inner)  # a gated GELU keeps all that it passes through
    if plan.scores:  # their products are taken in fp32
        kept += (4 - c) * (attended - network.attention_width) + plan.scores * network.heads * length
    return kept


def _of_cross_attention(plan: Plan) -> float:
    """Bytes that a token of the decoder adds by looking at what the encoder has read: its keys and values are there
    for every token of the encoder."""
    network, c = plan.network, COMPUTE[plan.precision]
    wide, narrow, _ = LAYERS[network.family]
    kept = wide / 2 * _residual(plan) * network.hidden + (narrow / 2 - 1) * c * network.hidden
    width = 4 if plan.scores else c
    kept += (width + c) * network.attention_width + 2 * width * network.kv_width * plan.sequence / plan.decoded
    return kept + plan.scores * network.heads * plan.sequence


def activations(plan: Plan) -> float:
    """Bytes of all activations of a micro-batch that are there when the backward pass begins."""
    network, layout, residual = plan.network, plan.layout, _residual(plan)

    def stack(depth: int, length: int, decoder: bool = False) -> float:
        tokens = plan.passes * plan.micro_batch * length / layout.context
        layers = math.ceil(depth / layout.pipeline)
        in_flight = min(layout.pipeline, depth)  # 1F1B: the first stage holds as many micro-batches as stages
        # sequence parallelism divides the norms' inputs, too
        a_layer = activations_per_token(plan, decoder) / layout.tensor
        ends = 2 * residual * network.hidden / layout.tensor  # the embedding's output and the last norm's input
        if plan.checkpointing:  # each layer's input; one layer computed again, and the gradients of what it keeps
            return tokens * (layers * in_flight * residual * network.hidden / layout.tensor + 2 * a_layer + ends)
        return tokens * (layers * in_flight * a_layer + ends)

    beside = stack(network.decoder_layers, plan.decoded, True) if network.decoder_layers else 0.0
    return stack(network.layers, plan.sequence) + beside + plan.micro_batch * _gathered(plan)


def _gathered(plan: Plan) -> float:
    """Bytes a row of what one layer's attention puts together where devices hold parts of rows: all keys and values,
    repeated for every head, their gradients (summed in fp32), and the mask of half a part."""
    network, n, c = plan.network, plan.layout.context, COMPUTE[plan.precision]
    if n == 1:
        return 0.0
    numbers = c * (4 * network.kv_width + 4 * network.attention_width) + 8 * network.kv_width
    return plan.sequence * (numbers + plan.sequence / (2 * n) * (1 + c))


def megatron_activations(sequence: int, rows: int, hidden: int, heads: int, layers: int = 1) -> float:
    """s·b·h·(34 + 5·a·s/h) bytes a layer: fp16, no recomputation, no parallelism (Korthikanti et al., 2022, eq. 1)."""
    return layers * sequence * rows * hidden * (34 + 5 * heads * sequence / hidden)
