"""Context parallelism: every process holds a part of each row's tokens (Llama 3, Grattafiori et al., 2024, section
3.3.2: all-gather based).

A row of T tokens is cut into 2N chunks, and process i of N takes the chunks i and 2N − 1 − i: under causal attention
the first sees little and the second much, so that all have the same work. Everything but attention looks at one token
at a time. Inside attention the keys and values of all parts are gathered, a layer at a time, and each query sees what
it would see in one process: its own document, nothing ahead of it, no further back than the layer's window, all by
the place in the whole row. On the way back their gradients are added up in fp32 and divided again.

Activations are T / N a process. The gathered keys and values of one layer are whole, and only while it computes: they
are gathered again on the way back (a second forward pass of attention) instead of being kept for every layer.

What a token has to predict may lie in another part: labels are shifted before rows are cut, and a part comes with
`targets` in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fledge.models.block_attention import document_starts
from fledge.models.states import decoder_of
from fledge.training.kernels import PARTS as NAME
from fledge.training.likelihood import shifted
from fledge.training.monitoring.sources import KEY as SOURCE
from fledge.training.objective import Batch


@dataclass(frozen=True)
class Parts:
    """How rows are divided among the `count` processes of a group, of which we are at `place`."""

    group: Any
    place: int
    count: int

    @property
    def chunks(self) -> tuple[int, int]:
        """Ours, of the 2 · count of a row."""
        return self.place, 2 * self.count - 1 - self.place

    def of(self, tokens: Tensor) -> Tensor:
        """Our part of something said of every token: (B, T) → (B, T / count). 2 · count divides T."""
        chunks = tokens.chunk(2 * self.count, dim=1)
        return torch.cat([chunks[number] for number in self.chunks], dim=1)

    def take(self, batch: Batch) -> dict[str, Tensor]:
        """Our part of the rows' tokens. What is said of whole rows stays.

        `starts` (B, T / count) says where each token's document begins in the whole row, `targets` what it predicts.
        """
        whole = {name: value for name, value in batch.items() if name != "labels"}
        whole["targets"] = shifted(batch["labels"])
        whole["starts"] = document_starts(batch["position_ids"])
        if SOURCE in whole and whole[SOURCE].ndim == 2:  # a target's source is its own, not that of the token before
            whole[SOURCE] = torch.roll(whole[SOURCE], -1, dims=1)
        shape = batch["input_ids"].shape
        return {name: self.of(value) if value.shape == shape else value for name, value in whole.items()}

    def in_order(self, gathered: Tensor) -> Tensor:
        """What all processes have (count, …, T / count, D), laid out as the rows are: (…, T, D)."""
        first, second = gathered.chunk(2, dim=-2)
        chunks = torch.cat([first, second.flip(0)])  # (2 · count, …, T / (2 · count), D)
        return chunks.movedim(0, -3).flatten(-3, -2)

    def by_process(self, whole: Tensor) -> Tensor:
        """The reverse of `in_order`."""
        chunks = whole.unflatten(-2, (2 * self.count, -1)).movedim(-3, 0)
        first, second = chunks.chunk(2)
        return torch.cat([first, second.flip(0)], dim=-2)


def with_positions(batch: Batch) -> Batch:
    """Rows that say where their tokens stand. Padded ones need no mask: no token looks at what follows it."""
    if "attention_mask" not in batch and "position_ids" in batch:
        return batch
    ids = batch["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return {**{name: value for name, value in batch.items() if name != "attention_mask"}, "position_ids": positions}


def put_on(model: Any, parts: Parts) -> None:
    """From now on `model` reads parts of rows. One division at a time in a process."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    AttentionInterface.register(NAME, torch.compiler.disable(partial(_for_transformers, parts)))
    inner.set_attn_implementation(NAME)


def part_states(model: Any, batch: Batch) -> Tensor:
    """The last hidden states (B, T / count, D) of a part."""
    found: Tensor = decoder_of(model)(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"],
        attention_mask=batch["starts"][:, None, :, None], use_cache=False,
    ).last_hidden_state  # fmt: skip
    return found


def _for_transformers(
    parts: Parts, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: query (B, H, T / count, D), `attention_mask` is `starts` as (B, 1, T / count, 1)."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # before they travel
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = _Gather.apply(torch.stack([key, value]), parts)
        found = []
        for chunk, q, starts in zip(parts.chunks, query.chunk(2, 2), attention_mask.chunk(2, 2), strict=True):
            first, end, seen = visible(chunk, starts, sliding_window or 0)
            k, v = keys[:, :, first:end], values[:, :, first:end]
            found.append(sdpa_attention_forward(module, q, k, v, seen, dropout, scaling)[0])
        return torch.cat(found, dim=1)  # (B, T / count, H, D)

    return checkpoint(attend, query, key, value, use_reentrant=False, preserve_rng_state=dropout > 0), None


def visible(chunk: int, starts: Tensor, window: int = 0) -> tuple[int, int, Tensor]:
    """(first key, end) of what a chunk of queries sees of the whole row, and which of it each of them sees.

    `starts` (B, 1, S, 1) says where their documents begin; the mask is (B, 1, S, end − first).
    """
    size = starts.shape[2]
    end = (chunk + 1) * size
    first = max(0, chunk * size - window + 1) if window else 0
    query = torch.arange(chunk * size, end, device=starts.device)[:, None]
    key = torch.arange(first, end, device=starts.device)
    seen = (key <= query) & (key >= starts)
    return first, end, seen & (key > query - window) if window else seen


class _Gather(torch.autograd.Function):
    """(…, T / count, D) of every process → (…, T, D), the same on all; backwards the sum of what each makes of it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, parts: Parts) -> Tensor:
        ctx.parts = parts
        gathered = collectives.all_gather_tensor(part.contiguous(), 0, parts.group)
        return parts.in_order(collectives.wait_tensor(gathered).unflatten(0, (parts.count, -1)))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        summands = ctx.parts.by_process(upstream).to(torch.promote_types(upstream.dtype, torch.float32))
        part = collectives.reduce_scatter_tensor(summands.flatten(0, 1).contiguous(), "sum", 0, ctx.parts.group)
        return collectives.wait_tensor(part).to(upstream.dtype), None


AttentionMaskInterface.register(NAME, lambda *args, **rest: None)
