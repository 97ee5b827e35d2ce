"""How well a model predicts text it has not seen, in numbers that compare across tokenizers.

Bits per byte: Σ −log₂ p over every token of a text, divided by its UTF-8 bytes. Two baselines stand beside it on the
same bytes: what `xz -9` makes of them, and a byte n-gram model trained on the same training text (`ngrams.py`).
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.data.tokens.packing import encode_plain
from fledge.training.likelihood import IGNORED, head_of, hidden_states, shifted, token_logprobs

TOKENS_AT_ONCE = 8192

encode = encode_plain
"""Token ids of each text as plain text: nothing added, no spelling of a control token taken for one."""


@dataclass(frozen=True)
class BitsPerByte:
    """Bits a byte, and what they were measured on."""

    value: float
    bytes: int
    tokens: int


def bits_per_byte(
    model: Any, tokenizer: Any, texts: Sequence[str], window: int = 0, stride: int = 0, dtype: str = "float32"
) -> BitsPerByte:
    """Σ −log₂ p(token | tokens before it in its text) ÷ UTF-8 bytes, every token of every text counted once.

    The first token of a text is predicted from the separator alone. A text longer than `window` tokens (the model's
    context by default) is read in windows that move on by `stride` tokens (half a window by default), so that each
    token but the first ones has at least window − stride tokens before it.
    """
    window = window or model.config.get_text_config().max_position_embeddings
    stride = stride or max(1, window // 2)
    separator = separator_id(tokenizer)
    rows = [row for ids in encode_plain(tokenizer, texts) for row in windows([separator, *ids], window, stride)]
    counted = sum(len(ids) - start for ids, start in rows)
    nats = math.fsum(_nll(model, [_row(ids, start) for ids, start in rows], dtype))
    size = sum(len(text.encode()) for text in texts)
    return BitsPerByte(nats / math.log(2) / size, size, counted)


def windows(ids: Sequence[int], window: int, stride: int) -> Iterator[tuple[Sequence[int], int]]:
    """(ids of a window, index in it of the first token to count): together every token but the first, once."""
    counted = 1  # ids[0] is context only
    while counted < len(ids):
        end = min(len(ids), max(window, counted + stride))
        start = max(0, end - window)
        yield ids[start:end], counted - start
        counted = end


def answer_loss(
    model: Any, renderer: Any, conversations: Iterable[Any], max_length: int = 1024, dtype: str = "float32"
) -> tuple[float, int]:
    """Mean −log p (nats) over the content tokens of the assistants' answers, and how many there were.

    The end-of-turn token is left out: a model that has not seen the template would lose on it alone.
    """
    stops, rows = set(renderer.stop_ids), []
    for conversation in conversations:
        rendered = renderer.render(conversation.messages)
        ids, weights = rendered.ids[:max_length], rendered.weights[:max_length]
        learned = zip(ids, weights, strict=True)
        rows.append((ids, [i if w > 0 and i not in stops else IGNORED for i, w in learned]))
    count = sum(label != IGNORED for _, labels in rows for label in labels[1:])
    return math.fsum(_nll(model, rows, dtype)) / max(1, count), count


def xz_bits_per_byte(data: bytes) -> float:
    """Bits a byte that `xz -9` needs for `data`, its container included."""
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def separator_id(tokenizer: Any) -> int:
    """The token that stands before a text: end-of-text where there is one, else the tokenizer's bos or eos."""
    vocabulary = tokenizer.get_vocab()
    names = ("<|endoftext|>", "<|end_of_text|>", tokenizer.bos_token, tokenizer.eos_token)
    return int(next(vocabulary[name] for name in names if name in vocabulary))


def _row(ids: Sequence[int], start: int) -> tuple[Sequence[int], list[int]]:
    return ids, [IGNORED] * start + list(ids[start:])


def _nll(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], dtype: str) -> Iterator[float]:
    """Σ −log p of the labels of every (ids, labels), batched by length; in the order of the batches."""
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index][0]), index))
    was_training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(model.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        while order:
            longest = len(rows[order[-1]][0])
            taken = [rows[index] for index in order[-max(1, TOKENS_AT_ONCE // longest) :]]
            del order[-len(taken) :]
            batch = {name: tensor.to(model.device) for name, tensor in _padded(taken, longest).items()}
            hidden = hidden_states(model, batch)
            yield -float(token_logprobs(hidden, head_of(model), shifted(batch["labels"])).double().sum())
    model.train(was_training)


def _padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for index, (tokens, targets) in enumerate(rows):
        ids[index, : len(tokens)] = torch.as_tensor(tokens)
        labels[index, : len(tokens)] = torch.as_tensor(targets)
        mask[index, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
