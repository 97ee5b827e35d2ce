"""Do several copies of a model answer alike? The same prompt to each, its likeliest answer and its first distribution.

    for copy in agreement([merged, int8, export / "model-q8_0.gguf"], [Message("user", "Who are you?")]):
        print(copy.path, copy.text, copy.first_kl)

Greedy texts of copies in other number formats part sooner or later, where two tokens are nearly as likely: `common`
says after how many tokens, `first_kl` how far apart they are where they still have the same past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fledge.inference.engine import Request
from fledge.inference.native import NativeEngine
from fledge.models.importing import load_gguf
from fledge.models.load import load_model, load_tokenizer
from fledge.models.merging import log_probabilities
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Message


@dataclass(frozen=True)
class Copy:
    """One copy's answer, compared with the first copy's."""

    path: Path
    text: str
    token_ids: tuple[int, ...]
    first_kl: float
    """KL divergence in nats of its first token's distribution from the first copy's"""
    common: int
    """how many tokens at the start of both answers are the same"""
    same: bool
    """whether both answers are the very same tokens"""


def agreement(paths: Sequence[Path], messages: Sequence[Message], max_new_tokens: int = 32) -> list[Copy]:
    """What each model folder or `.gguf` file answers, greedily, in fp32, each compared with the first.

    They must share one tokenizer. GGUF files are read by transformers.
    """
    copies: list[Copy] = []
    reference = torch.empty(0)
    for path in paths:
        model, tokenizer = load_gguf(path) if path.suffix == ".gguf" else (load_model(path), load_tokenizer(path))
        renderer = ChatRenderer(tokenizer)
        prompt = renderer.render(list(messages), add_generation_prompt=True).ids
        said = log_probabilities(model, torch.tensor([prompt]))[0, -1]  # (V,)
        reference = said if not copies else reference
        with NativeEngine(model, tokenizer, renderer) as engine:
            request = Request(messages=tuple(messages), temperature=0, max_new_tokens=max_new_tokens)
            choice = engine.generate([request])[0].choice
        first = copies[0].token_ids if copies else choice.token_ids
        kl = float((reference.exp() * (reference - said)).sum().clamp(min=0))
        same, common = first == choice.token_ids, _common(first, choice.token_ids)
        copies.append(Copy(path, choice.text, choice.token_ids, kl, common, same))
    return copies


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
