"""Floating-point operations that training a model's tokens takes, counted on the model itself.

A weight that multiplies costs 2 a token forward, 2 for the gradient of what goes in and, where it is trained, 2 for its
own; attention's two products cost 12 · layers · width · sequence in all (Kaplan et al., 2020; Narayanan et al., 2021:
every position counted, masked or not, as is the custom for MFU). What is computed a second time does not count.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def flops_per_token(model: Any, sequence: int) -> float:
    """Operations to train on one token of a row of `sequence` tokens; 0.0 for a model whose shape we cannot read."""
    read = getattr(model, "config", None)
    config = read.get_text_config() if read is not None and hasattr(read, "get_text_config") else None
    layers = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    if config is None or layers is None or width is None:
        return 0.0
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None)
    attended = heads * head_dim if heads and head_dim else width
    return sum(_multiplied(model)) + 12.0 * layers * attended * sequence


def _multiplied(model: nn.Module) -> list[float]:
    """4 operations a token for every weight of a matrix that multiplies, 6 where it is trained."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = id(getattr(head, "weight", None))
    return [
        (6.0 if parameter.requires_grad else 4.0) * parameter.numel()
        for parameter in model.parameters()
        if parameter.ndim == 2 and (id(parameter) not in looked_up or id(parameter) == tied)
    ]
