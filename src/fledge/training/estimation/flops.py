"""Floating-point operations of training and inference.

A matrix of P numbers costs 2·P a token forward and 4·P backward; attention's two products cost 4·d·s a layer and token
forward, three times that in training (Kaplan et al., 2020, table 1; Narayanan et al., 2021, appendix). Embeddings are
looked up, not multiplied: they do not count, the output layer does.
"""

from __future__ import annotations

from typing import Literal

from fledge.training.estimation.network import Network

Recompute = Literal["none", "full"]


def flops_per_token(
    network: Network, sequence: float, *, frozen_base: bool = False, recompute: bool = False, trained: float = 0.0
) -> float:
    """Operations to train on one token of a row of `sequence` tokens.

    6 a multiplying weight and 12·L·d·s for attention; 4 a weight where the base is frozen (its own gradients are not
    made) and 6 for each of the `trained` parameters of an adapter; a third more where activations are computed again.
    An encoder-decoder reads half of the tokens and writes the other half.
    """
    attention = 12 * (network.layers + 2 * network.decoder_layers) * network.attention_width * sequence
    weights = (4 if frozen_base else 6) * network.multiplying + 6 * trained * frozen_base
    total = weights + attention
    if recompute:  # one more pass forward through the layers, not through the output layer
        total += 2 * (network.matrices + trained * frozen_base) + attention / 3
    return total / 2 if network.decoder_layers else total


def inference_flops_per_token(network: Network, context: float) -> float:
    """Operations to read or write one token with `context` tokens before it: 2 a weight, 4·L·d·s for attention."""
    return 2 * network.multiplying + 4 * network.layers * network.attention_width * context
