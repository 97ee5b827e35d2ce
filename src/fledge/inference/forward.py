"""The forward passes of a decoder-only model: a chunk of a prefill, a step of decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.inference.cache import SlotCache
from fledge.inference.scheduler import Prefill


class Forward:
    """A `transformers` causal language model whose attention masks and positions we say ourselves."""

    def __init__(self, model: Any) -> None:
        """Raises FledgeError for models that keep more (or less) than keys and values of every token."""
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
        if model.config.is_encoder_decoder or not kinds <= {"full_attention", "sliding_attention"}:
            raise FledgeError(
                Problem(
                    t("the native engine runs decoder-only models with full attention"),
                    found=f"{type(model).__name__} ({listing(sorted(kinds))})",
                )
            )
        if model.config._attn_implementation not in ("sdpa", "eager"):
            model.set_attn_implementation("sdpa")
        self.model, self.device = model, model.device
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.writes = not type(inner).__name__.endswith("ForSequenceClassification")
        """whether it is a language model; a reward model reads only"""
        self.additive = model.config._attn_implementation == "eager"
        # Within its window a sliding layer is a full one: the engine simply ends there.
        limits = [getattr(config, "max_position_embeddings", None), window if "sliding_attention" in kinds else None]
        self.context: int = min((limit for limit in limits if limit), default=2048)

    def prefill(self, group: Prefill, tokens: int) -> Tensor | None:
        """Read at most about `tokens` more tokens; (rows, V) fp32 logits of the last ones when all are read."""
        width, rows = group.width, list(group.rows)
        end = min(width, group.done + max(1, tokens // len(rows)))
        pads = torch.tensor([width - len(ids) for ids in rows], device=self.device)[:, None]  # (B, 1)
        chunk = [([0] * (width - len(ids)) + list(ids))[group.done : end] for ids in rows]
        columns = torch.arange(end, device=self.device)
        queries = columns[group.done :]
        mask = None
        if bool(pads.any()):  # a padding token sees only itself: no row of the softmax may be empty
            seen = (columns <= queries[:, None]) & ((columns >= pads[:, :, None]) | (columns == queries[:, None]))
            mask = self.mask(seen[:, None])  # (B, 1, Q, K)
        logits = self._run(chunk, (queries - pads).clamp(min=0), mask, group.cache, logits_to_keep=1)
        group.done = end
        return logits if end == width else None

    def decode(self, last: list[int], cache: SlotCache) -> Tensor:
        """One step of every slot from its `last` token: (B, V) fp32 logits."""
        positions, seen = cache.begin_step()
        logits = self._run([[token] for token in last], positions, self.mask(seen), cache)
        cache.end_step()
        return logits

    def _run(self, ids: list[list[int]], positions: Tensor, mask: Tensor | None, cache: Any, **more: Any) -> Tensor:
        output = self.model(
            input_ids=torch.tensor(ids, device=self.device), position_ids=positions, attention_mask=mask,
            past_key_values=cache, use_cache=True, **more,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def mask(self, seen: Tensor) -> Tensor:
        """The attention mask for "may see" (B, 1, Q, K) in the form that the model's attention takes."""
        if not self.additive:
            return seen
        zero = torch.zeros((), dtype=self.model.dtype, device=self.device)
        return torch.where(seen, zero, torch.finfo(self.model.dtype).min)
