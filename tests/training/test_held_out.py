"""Bits per byte, answer losses and the baselines, each against a slow and obvious computation."""

from __future__ import annotations

import lzma
import math
import time

import numpy as np
import pytest
import torch

from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation, Message
from fledge.training.held_out import answer_loss, bits_per_byte, separator_id, windows, xz_bits_per_byte
from fledge.training.ngrams import ByteNgrams, ngram_bits_per_byte
from tests.training.toys import tiny, tokenizer

TEXTS = ["hello hello there", "人民法院依法审理。", "a", "one two three " * 30]


def test_every_token_but_the_first_is_counted_once_with_context_before_it() -> None:
    for length in range(2, 60):
        for window, stride in ((8, 4), (8, 8), (8, 1), (5, 3), (100, 50)):
            ids = list(range(length))
            counted: list[int] = []
            for row, start in windows(ids, window, stride):
                assert len(row) <= window and list(row) == list(range(row[0], row[0] + len(row)))
                assert start >= min(len(row) - 1, window - stride, row[0] + 1) or row[0] == 0
                counted += row[start:]
            assert counted == ids[1:], (length, window, stride)


def test_bits_per_byte_is_what_the_logits_say() -> None:
    names = tokenizer()
    model = tiny(vocab=len(names)).eval()
    bits = 0.0
    for text in TEXTS[:3]:
        ids = [separator_id(names), *names(text, add_special_tokens=False)["input_ids"]]
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].detach().double(), dim=-1)
        bits -= sum(float(logprobs[i, token]) for i, token in enumerate(ids[1:])) / math.log(2)
    found = bits_per_byte(model, names, TEXTS[:3])
    assert found.bytes == len("".join(TEXTS[:3]).encode())
    assert found.value == pytest.approx(bits / found.bytes, rel=1e-5)
    assert found.value > 3, "an untrained model knows nothing"


def test_long_texts_are_read_in_windows() -> None:
    names = tokenizer()
    model = tiny(vocab=len(names)).eval()
    ids = [separator_id(names), *names(TEXTS[3], add_special_tokens=False)["input_ids"]]
    bits = 0.0
    for row, start in windows(ids, 64, 32):
        logprobs = torch.log_softmax(model(torch.tensor([row])).logits[0].detach().double(), dim=-1)
        bits -= sum(float(logprobs[i - 1, row[i]]) for i in range(start, len(row))) / math.log(2)
    found = bits_per_byte(model, names, [TEXTS[3]])
    assert len(ids) > 64 and found.tokens == len(ids) - 1
    assert found.value == pytest.approx(bits / len(TEXTS[3].encode()), rel=1e-5)
    assert bits_per_byte(model, names, [TEXTS[3]], window=16, stride=16).tokens == len(ids) - 1


def test_control_spellings_in_text_are_text() -> None:
    names = tokenizer()
    model = tiny(vocab=len(names)).eval()
    assert bits_per_byte(model, names, ["<|endoftext|>"]).tokens > 1


def test_answer_loss_counts_the_assistants_words_and_not_the_end_of_turn() -> None:
    names = tokenizer()
    model, renderer = tiny(vocab=len(names)).eval(), ChatRenderer(names)
    turns = (
        Message("user", "hello"),
        Message("assistant", "there 你好"),
        Message("user", "a"),
        Message("assistant", "b"),
    )
    chats = [Conversation(turns), Conversation(turns[:2])]
    total, count = 0.0, 0
    for chat in chats:
        rendered = renderer.render(chat.messages)
        logprobs = torch.log_softmax(model(torch.tensor([rendered.ids])).logits[0].detach().double(), dim=-1)
        for i, (token, weight) in enumerate(zip(rendered.ids, rendered.weights, strict=True)):
            if weight and token not in renderer.stop_ids:
                total, count = total - float(logprobs[i - 1, token]), count + 1
    found, tokens = answer_loss(model, renderer, chats)
    answers = ["there 你好", "b", "there 你好"]
    assert tokens == count == sum(len(names(a, add_special_tokens=False)["input_ids"]) for a in answers)
    assert found == pytest.approx(total / count, rel=1e-5)


def test_xz_is_the_whole_file() -> None:
    data = "".join(TEXTS).encode()
    assert xz_bits_per_byte(data) == 8 * len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9)) / len(data)


def slow_witten_bell(text: bytes, context: bytes, symbol: int) -> float:
    """The recursion by counting substrings."""
    p = 1 / 256
    padded = text + b"\0" * 7
    for length in range(len(context) + 1):
        c = context[len(context) - length :]
        followers = [padded[i + length] for i in range(len(text)) if padded[i : i + length] == c]
        if followers:
            kinds = len(set(followers))
            p = (followers.count(symbol) + kinds * p) / (len(followers) + kinds)
    return p


def test_the_ngram_model_is_witten_bells_and_a_proper_distribution() -> None:
    text = ("the cat sat on the mat. " * 3 + "猫坐在垫子上。" * 2).encode()
    model = ByteNgrams(text, order=4)
    for context in (b"the", b"zzz", b"at ", "猫".encode(), b"\0\0\0"):
        contexts = np.tile(np.frombuffer(context, dtype=np.uint8), (256, 1))
        p = model.probabilities(contexts, np.arange(256, dtype=np.uint8))
        assert p.sum() == pytest.approx(1.0, abs=1e-12) and p.min() > 0
        for symbol in (ord("c"), ord(" "), 0, 255):
            assert p[symbol] == pytest.approx(slow_witten_bell(text, context, symbol), rel=1e-12)


def test_the_ngram_baseline_learns_and_is_fast() -> None:
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 9)).tolist()) for _ in range(300)]
    text = b" ".join(words[i] for i in rng.zipf(1.4, 200_000) % 300)
    train, held_out = text[:-20_000], text[-20_000:]
    began = time.process_time()
    found = ngram_bits_per_byte(train, held_out)
    assert time.process_time() - began < 5
    assert found < xz_bits_per_byte(held_out) and found < ngram_bits_per_byte(train, held_out, order=2)
    assert ngram_bits_per_byte(train, rng.bytes(5000)) > 7.5
