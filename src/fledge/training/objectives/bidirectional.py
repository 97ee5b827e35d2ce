"""What encoders and encoder-decoders make of rows of tokens: states at the places that are predicted, and the head.

Documents that share a row do not see each other: neither in the encoder, nor in the decoder, nor from one to the
other. Positions restart at each document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.training.likelihood import Head
from fledge.training.objective import Batch

Transform = Callable[[Tensor], Tensor]


def encoder_states(model: Any, batch: Batch) -> Tensor:
    """The encoder's last states (B, T, D), which masked tokens are predicted from.

    Batches: `input_ids`, `position_ids`, and `attention_mask` where rows are padded on the right. A DeBERTa that has
    a table of absolute positions goes through its enhanced mask decoder.
    """
    body, mask = body_of(model), mask_of(batch)
    ids, positions = batch["input_ids"], batch["position_ids"]
    if is_deberta(model):
        return deberta_states(body, batch, mask)
    if hasattr(body.embeddings, "create_position_ids_from_input_ids"):  # RoBERTa counts from behind its padding id
        positions = positions + body.embeddings.padding_idx + 1
    found: Tensor = body(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return found


def seq2seq_states(model: Any, batch: Batch) -> Tensor:
    """The decoder's last states (B, T, D), as the output layer takes them.

    Batches: `input_ids`, `decoder_input_ids`, and the `documents` and `decoder_documents` that they belong to.
    """
    inside, own = batch["documents"], batch["decoder_documents"]
    place = torch.arange(own.shape[1], device=own.device)
    causal = (place[None, :] <= place[:, None])[None, None]
    encoder, decoder = model.get_encoder(), model.get_decoder()
    encoded = encoder(**_embedded(encoder, batch["input_ids"], inside), attention_mask=_same(inside, inside))
    states: Tensor = decoder(
        **_embedded(decoder, batch["decoder_input_ids"], own),
        attention_mask=_same(own, own) & causal,
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=_same(own, inside),
        use_cache=False,
    ).last_hidden_state
    config = model.config
    scaled = config.model_type == "t5" and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return states * config.d_model**-0.5 if scaled else states


def _embedded(stack: Any, ids: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """What a stack of layers reads. BART counts positions along the row: the difference that makes them restart with
    each document is added to the embeddings."""
    if not hasattr(stack, "embed_positions"):
        return {"input_ids": ids}
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    start = torch.where(first, place, torch.zeros_like(place)).cummax(dim=1).values
    table, offset = stack.embed_positions.weight, stack.embed_positions.offset
    return {"inputs_embeds": stack.embed_tokens(ids) + table[place - start + offset] - table[place + offset]}


def head_over_vocabulary(model: Any) -> tuple[Transform, Head]:
    """What a masked language model's (or an encoder-decoder's) states go through, and the output layer as numbers.

    BERT's head is a dense layer, an activation and a norm before the matrix to the vocabulary with its bias; taken
    apart, the states that nothing is predicted from are left out before the first of them.
    """
    inner = _inner(model)
    if hasattr(inner, "cls"):  # BERT, DeBERTa as it is built by default
        predictions = inner.cls.predictions
        return predictions.transform, Head(predictions.decoder.weight, predictions.decoder.bias)
    if hasattr(inner, "generator_predictions"):  # ELECTRA's generator
        return inner.generator_predictions, Head(inner.generator_lm_head.weight, inner.generator_lm_head.bias)
    if hasattr(inner, "lm_predictions"):  # DeBERTa's own form
        own = inner.lm_predictions.lm_head
        embedding = inner.get_input_embeddings().weight
        return lambda h: own.LayerNorm(own.transform_act_fn(own.dense(h))), Head(embedding, own.bias)
    if hasattr(inner, "final_logits_bias"):  # BART
        return _unchanged, Head(inner.lm_head.weight, inner.final_logits_bias[0])
    top: Any = getattr(inner, "lm_head", None)
    if hasattr(top, "layer_norm"):  # RoBERTa
        return lambda h: top.layer_norm(F.gelu(top.dense(h))), Head(top.decoder.weight, top.decoder.bias)
    if type(top) is torch.nn.Linear and inner.config.is_encoder_decoder:  # T5
        return _unchanged, Head(top.weight, top.bias)
    raise FledgeError(
        Problem(t("no head that predicts masked tokens is known for this model"), found=type(inner).__name__)
    )


@torch.no_grad()
def likeliest(states: Tensor, head: Head) -> Tensor:
    """The likeliest token (n,) of states (n, D), a thousand rows at a time."""
    found = [states.new_zeros(0, dtype=torch.long)]
    for rows in states.split(1024):
        logits = rows.to(head.weight.dtype) @ head.weight.T
        found.append((logits if head.bias is None else logits + head.bias).argmax(dim=-1))
    return torch.cat(found)


def mask_of(batch: Batch) -> Tensor:
    """Which key each query may see: (B, 1, T, T), true within a document, false on padding."""
    documents = (batch["position_ids"] == 0).cumsum(dim=-1)  # positions restart at 0
    mask = _same(documents, documents)
    return mask & (batch["attention_mask"] > 0)[:, None, None] if "attention_mask" in batch else mask


def _same(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def body_of(model: Any) -> Any:
    """The encoder without what stands on top."""
    inner = _inner(model)
    return getattr(inner, inner.base_model_prefix)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _unchanged(states: Tensor) -> Tensor:
    return states


# --- DeBERTa, whose own forward pass takes no masks between documents ------------------------------------------------


def is_deberta(model: Any) -> bool:
    """Whether the model is a DeBERTa-v2 or -v3."""
    return bool(_inner(model).config.model_type == "deberta-v2")


def deberta_states(body: Any, batch: Batch, mask: Tensor) -> Tensor:
    """The last states (B, T, D), with a mask (B, 1, T, T).

    The enhanced mask decoder (He et al., 2021, section 3.2) stands in for the last layer where the embeddings have a
    table of absolute positions: twice the last layer, asked by the states below it plus the positions, then by its
    own answer, and both times looking at the states below.
    """
    encoder, table, positions = body.encoder, body.embeddings.position_embeddings, batch["position_ids"]
    attended = batch.get("attention_mask", torch.ones_like(positions))
    states = before = body.embeddings(input_ids=batch["input_ids"], position_ids=positions, mask=attended)
    enhanced = table is not None and not body.embeddings.position_biased_input
    about = {"relative_pos": encoder.get_rel_pos(states), "rel_embeddings": encoder.get_rel_embedding()}
    for number, layer in enumerate(encoder.layer[:-1] if enhanced else encoder.layer):
        states, _ = layer(states, mask, **about)
        if number == 0 and encoder.conv is not None:
            states = _convolved(encoder.conv, before, states, attended, (positions == 0).cumsum(dim=1) - 1)
    if not enhanced:
        return states
    query = states + table(positions)
    for _ in range(2):
        query, _ = encoder.layer[-1](states, mask, query_states=query, **about)
    return query


def _convolved(layer: Any, before: Tensor, states: Tensor, attended: Tensor, documents: Tensor) -> Tensor:
    """The convolution beside the first layer of DeBERTa-v2, with as much nothing between two documents as it is wide;
    documents (B, T) count from 0."""
    gap = layer.conv.kernel_size[0] // 2
    at = torch.arange(documents.shape[1], device=documents.device) + gap * documents  # (B, T), where each token goes
    width = int(at.max()) + 1

    def spread(x: Tensor) -> Tensor:
        room = x.new_zeros(len(x), width, *x.shape[2:])
        return room.scatter(1, at.view(*at.shape, *[1] * (x.ndim - 2)).expand_as(x), x)

    found = layer(spread(before), spread(states), spread(attended))
    return found.gather(1, at[:, :, None].expand_as(states))


def add_absolute_positions(model: Any, seed: int, known: Tensor | None = None) -> None:
    """Give a DeBERTa the table of absolute positions that its enhanced mask decoder asks with: `known`, or a new one.

    It is saved with the model as `deberta.embeddings.position_embeddings`, which transformers leaves aside on loading:
    the plain class then stands as it does in fine-tuning.
    """
    config, body = model.config, body_of(model)
    table = torch.nn.Embedding(config.max_position_embeddings, config.hidden_size)
    with torch.no_grad():
        if known is None:
            table.weight.normal_(0.0, config.initializer_range, generator=torch.Generator().manual_seed(seed))
        else:
            table.weight.copy_(known)
    body.embeddings.position_embeddings = table.to(model.device)
