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
from fledge.models.load import context_of
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
    found = text_nlls(model, tokenizer, texts, window, stride, dtype)
    nats, counted = math.fsum(nats for nats, _ in found), sum(count for _, count in found)
    size = sum(len(text.encode()) for text in texts)
    return BitsPerByte(nats / math.log(2) / size, size, counted)


def text_nlls(
    model: Any, tokenizer: Any, texts: Sequence[str], window: int = 0, stride: int = 0, dtype: str = "float32"
) -> list[tuple[float, int]]:
    """Of every text, read as `bits_per_byte` reads it: Σ −log p in nats, and how many tokens were counted."""
    window = window or context_of(model.config)
    stride = stride or max(1, window // 2)
    separator = separator_id(tokenizer)
    rows, owners = [], []
    for number, ids in enumerate(encode_plain(tokenizer, texts)):
        for part in windows([separator, *ids], window, stride):
            rows.append(_row(*part))
            owners.append(number)
    nats, counts = [0.0] * len(texts), [0] * len(texts)
    for owner, (_, labels), found in zip(owners, rows, row_nlls(model, rows, dtype), strict=True):
        nats[owner] += found
        counts[owner] += sum(label != IGNORED for label in labels)
    return list(zip(nats, counts, strict=True))


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
    found = answer_nlls(model, renderer, conversations, max_length, dtype)
    count = sum(tokens for _, tokens in found)
    return math.fsum(nats for nats, _ in found) / max(1, count), count


def answer_nlls(
    model: Any, renderer: Any, conversations: Iterable[Any], max_length: int = 1024, dtype: str = "float32"
) -> list[tuple[float, int]]:
    """Of every conversation: Σ −log p in nats of the tokens that `answer_loss` counts, and how many they are."""
    stops, rows = set(renderer.stop_ids), []
    for conversation in conversations:
        rendered = renderer.render(conversation.messages)
        ids, weights = rendered.ids[:max_length], rendered.weights[:max_length]
        learned = zip(ids, weights, strict=True)
        rows.append((ids, [i if w > 0 and i not in stops else IGNORED for i, w in learned]))
    counts = [sum(label != IGNORED for label in labels[1:]) for _, labels in rows]
    return list(zip(row_nlls(model, rows, dtype), counts, strict=True))


def xz_bits_per_byte(data: bytes) -> float:
    """Bits a byte that `xz -9` needs for `data`, its container included."""
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def separator_id(tokenizer: Any) -> int:
    """The token that stands before a text: end-of-text where there is one, else the tokenizer's bos, eos or sep."""
    vocabulary = tokenizer.get_vocab()
    names = ("<|endoftext|>", "<|end_of_text|>", tokenizer.bos_token, tokenizer.eos_token, tokenizer.sep_token)
    return int(next(vocabulary[name] for name in names if name in vocabulary))


def _row(ids: Sequence[int], start: int) -> tuple[Sequence[int], list[int]]:
    return ids, [IGNORED] * start + list(ids[start:])


def row_nlls(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], dtype: str) -> list[float]:
    """Σ −log p of the labels of every (ids, labels), in their order; they are read in batches of like length."""
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index][0]), index))
    found = [0.0] * len(rows)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(model.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        while order:
            longest = len(rows[order[-1]][0])
            some = order[-max(1, TOKENS_AT_ONCE // longest) :]
            del order[-len(some) :]
            padded = _padded([rows[index] for index in some], longest)
            batch = {name: tensor.to(model.device) for name, tensor in padded.items()}
            hidden = hidden_states(model, batch)
            logprobs = token_logprobs(hidden, head_of(model), shifted(batch["labels"])).double().sum(dim=1)
            for index, value in zip(some, logprobs.tolist(), strict=True):
                found[index] = -value
    model.train(was_training)
    return found


def _padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for index, (tokens, targets) in enumerate(rows):
        ids[index, : len(tokens)] = torch.as_tensor(tokens)
        labels[index, : len(tokens)] = torch.as_tensor(targets)
        mask[index, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
