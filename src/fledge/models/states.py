"""Hidden states of every family of decoders, with the documents of a packed row kept apart.

A packed row holds several texts one after another; `position_ids` restart at 0 where one begins, and there is no
attention mask. What keeps the texts apart depends on the attention kernel and on the family:

| kernel | how |
|---|---|
| ours on CPUs | where each token's document begins |
| SDPA, eager | a block-diagonal mask (B, 1, T, T), narrowed where a layer has a window |
| FlashAttention | rows laid end to end as one, and the documents' boundaries |
| FlexAttention | transformers makes its own mask from the positions |
| BLOOM, which reads no positions | its mask and its ALiBi bias are made by document here |

A row of one document, or one padded on the right, needs no mask under causal attention: no token looks ahead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface
from transformers.masking_utils import and_masks, eager_mask, packed_sequence_mask_function

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.models import block_attention

FULL, SLIDING = "full_attention", "sliding_attention"
ALIBI = ("bloom",)
BOTH_WAYS = ("bert", "roberta", "electra", "deberta-v2", "distilbert", "xlm-roberta", "camembert", "modernbert")


def decoder_of(model: Any) -> nn.Module:
    """The model without its head, adapters included."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    body: nn.Module = getattr(inner, inner.base_model_prefix)
    return body


def padded_states(body: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The last hidden states (B, T, D) of rows padded on the right; a mask matters where attention looks both ways."""
    mask = attention_mask if body.config.model_type in BOTH_WAYS else None
    return cast(Tensor, body(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state)


def packed_states(body: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """The last hidden states (B, T, D) of packed rows: each document's are what it has alone.

    Raises FledgeError for a model that would let documents see each other.
    """
    kernel, given = str(body.config._attn_implementation or "eager"), {"input_ids": input_ids, "use_cache": False}
    if body.config.model_type in ALIBI:
        with _by_document(body, position_ids):
            found = body(attention_mask=torch.ones_like(input_ids), **given)
        return cast(Tensor, found.last_hidden_state)
    require_packable(body)
    if "flash" in kernel:
        return _end_to_end(body, input_ids, position_ids)
    mask: Any = None
    if kernel == block_attention.NAME:
        mask = block_attention.document_starts(position_ids)[:, None, :, None]
    elif kernel in ("sdpa", "eager"):  # not every class would make its mask from the positions: XGLM does not
        mask = packed_masks(body.config, position_ids, body.dtype if kernel == "eager" else None)
    return cast(Tensor, body(attention_mask=mask, position_ids=position_ids, **given).last_hidden_state)


def require_packable(body: Any) -> None:
    """Refuse a decoder whose documents cannot be kept apart in one row, with the reason."""
    reason = ""
    if body.config.model_type in BOTH_WAYS or body.config.is_encoder_decoder:
        reason = t("it is no decoder")
    elif body.config.model_type not in ALIBI and "position_ids" not in inspect.signature(body.forward).parameters:
        reason = t("it takes no position ids")
    if reason:
        raise FledgeError(
            Problem(
                t("documents of a packed row would see each other in this model"),
                found=f"{body.config.model_type}: {reason}",
                fix=t("give it one text a row, padded"),
            )
        )


def packed_mask(position_ids: Tensor, window: int | None = None) -> Tensor:
    """Which key each query may see: (B, 1, T, T), true within a document, not ahead, and no further back than
    `window` tokens, the query's own included. Documents start at 0."""
    document = (position_ids == 0).cumsum(dim=-1)  # (B, T)
    same = document[:, :, None] == document[:, None, :]
    length = position_ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
    if window is not None and window < length:
        seen = seen.triu(1 - window)
    return (same & seen)[:, None]


def packed_masks(
    config: Any, position_ids: Tensor, additive: torch.dtype | None = None
) -> Tensor | dict[str, Tensor] | None:
    """One mask for all layers, or one for each kind of layer; None where there is a kind that we do not know: then
    transformers makes the masks from the positions. With `additive`, 0 and the lowest number of that format."""
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())

    def mask(window: int | None) -> Tensor:
        seen = packed_mask(position_ids, window)
        if additive is None:
            return seen
        return torch.zeros_like(seen, dtype=additive).masked_fill_(~seen, torch.finfo(additive).min)

    if kinds - {FULL, SLIDING}:
        return None
    if kinds == {FULL, SLIDING}:
        return {FULL: mask(None), SLIDING: mask(window)}
    return mask(None if kinds == {FULL} else window)


def _end_to_end(body: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """FlashAttention knows documents only in a batch of one row: (B, T) is laid out as (1, B · T).

    The boundaries are found once for all layers; every row begins a document.
    """
    positions = position_ids.reshape(1, -1)
    starts = (positions[0] == 0).nonzero().flatten().to(torch.int32)
    ends = torch.cat([starts, starts.new_tensor([positions.shape[1]])])  # cumulative lengths, from 0
    longest = int(ends.diff().max())
    found = body(
        input_ids=input_ids.reshape(1, -1), position_ids=positions, use_cache=False,
        cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest,
    )  # fmt: skip
    states: Tensor = found.last_hidden_state
    return states.reshape(*input_ids.shape, -1)


# -- BLOOM -----------------------------------------------------------------------------------------------------------
_documents: ContextVar[Tensor | None] = ContextVar("documents", default=None)
_NAME = "eager_by_document"


def _mask_by_document(*args: Any, mask_function: Any, **options: Any) -> Any:
    """Eager attention's mask, within the documents of the rows that are being read."""
    documents = _documents.get()
    if documents is not None:
        mask_function = and_masks(mask_function, packed_sequence_mask_function(documents))
    return eager_mask(*args, mask_function=mask_function, **options)


AttentionMaskInterface.register(_NAME, _mask_by_document)


@contextmanager
def _by_document(body: Any, position_ids: Tensor) -> Iterator[None]:
    """Within the block, the mask is made by document, and the ALiBi bias starts anew with each: a document has the
    very bias that it has alone.

    Both are made once, in the model's forward and outside its layers: activation checkpointing keeps them.
    """
    build, implementation = type(body).build_alibi_tensor, body.config._attn_implementation

    def restarted(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        line = build(body, torch.ones_like(mask[:1]), heads, dtype)[:, 0]  # (H, T): slope · position
        return line[:, position_ids].transpose(0, 1).reshape(-1, 1, position_ids.shape[1])  # (B · H, 1, T)

    token = _documents.set((position_ids == 0).cumsum(dim=-1))
    body.build_alibi_tensor, body.config._attn_implementation = restarted, _NAME
    try:
        yield
    finally:
        _documents.reset(token)
        del body.build_alibi_tensor
        body.config._attn_implementation = implementation
