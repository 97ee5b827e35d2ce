"""Where a parameter stands between the head and the embeddings, in every family's way of naming layers.

Layer-wise learning rates and progressive unfreezing (Howard and Ruder, 2018) both go by it.
"""

from __future__ import annotations

import re

from torch import nn

LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
"""`model.layers.3.` (LLaMA, Qwen, Mistral, GLM, BART), `transformer.h.3.` (GPT-2, BLOOM), `encoder.layer.3.` (BERT,
RoBERTa, ELECTRA, DeBERTa), `encoder.block.3.` (T5, whose blocks hold a `layer.0.` of their own)."""
_TOWER = re.compile(r"(?:^|\.)(encoder|decoder)\.")


def depths(model: nn.Module) -> dict[str, int]:
    """Each parameter's distance below the head: 0 for the head and the last norm, 1 for the last layer, 2 for the one
    below it, …, and for the embeddings (with what belongs to them: positions, their norm, their projection) one more
    than there are layers.

    In an encoder-decoder the decoder's layers stand above the encoder's, whose last norm goes with its last layer.
    Tied to the head, the embeddings are embeddings.
    """
    found = {name: LAYER.search(name) for name, _ in model.named_parameters()}
    counts: dict[str, int] = {}  # layers of each tower
    for name, match in found.items():
        if match:
            tower = _tower(name)
            counts[tower] = max(counts.get(tower, 0), int(match[1]) + 1)
    both = {"encoder", "decoder"} <= set(counts)
    above = {"encoder": counts["decoder"]} if both else {}  # layers between a tower and the head
    bottom = sum(counts.values()) + 1
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {id(p) for p in head.parameters()} - tables if head is not None else set()
    placed = {}
    for name, parameter in model.named_parameters():
        tower, match = _tower(name), found[name]
        if match:
            placed[name] = above.get(tower, 0) + counts[tower] - int(match[1])
        elif id(parameter) in tables or ("embed" in name and id(parameter) not in heads):
            placed[name] = bottom
        else:
            placed[name] = above[tower] + 1 if tower in above else 0
    return placed


def layers_of(model: nn.Module) -> int:
    """How many layers there are, an encoder's and a decoder's together."""
    return max(depths(model).values(), default=1) - 1


def _tower(name: str) -> str:
    match = _TOWER.search(name)
    return match[1] if match else ""
