"""Tiny models and batches, made from seeds."""

from __future__ import annotations

from typing import Any

import numpy as np

from fledge.models.build import build_model
from fledge.models.shape import ModelShape
from fledge.training.settings import TrainSettings

VOCAB = 64


def tiny(seed: int = 1, vocab: int = VOCAB, hidden: int = 32, layers: int = 2) -> Any:
    """A LLaMA of two layers, 32 wide, with grouped queries."""
    shape = ModelShape(hidden=hidden, layers=layers, head_dim=8, kv_heads=2, context=64)
    return build_model(shape.resolve(vocab), seed)


def settings(**values: Any) -> TrainSettings:
    """Settings for a short run in fp32."""
    given = {"lr": 3e-3, "dtype": "float32", "warmup": 2, "log_every": 1, "checkpoint_every": 0, **values}
    return TrainSettings(**given)


class Packed:
    """Random packed rows; `uneven` leaves few labels in some rows."""

    def __init__(self, rows: int = 6, length: int = 16, uneven: bool = False, seed: int = 0) -> None:
        self.rows, self.length, self.uneven, self.seed = rows, length, uneven, seed

    def __len__(self) -> int:
        return 8

    def batch(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, step])
        ids = (rng.integers(0, 4, (self.rows, self.length)).cumsum(axis=1) + rng.integers(0, VOCAB)) % VOCAB
        labels = ids.copy()
        if self.uneven:
            for row in range(self.rows):
                labels[row, 2 + row * 2 :] = -100
        starts = rng.integers(4, self.length - 4, self.rows)
        positions = np.tile(np.arange(self.length), (self.rows, 1))
        for row, start in enumerate(starts):
            positions[row, start:] -= start
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


class Pairs:
    """Pairs of right-padded answers to one prompt: the better ones rise, the worse ones are random."""

    def __init__(self, rows: int = 4, seed: int = 0) -> None:
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return 4

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, step % len(self)])
        sides: dict[str, Any] = {}
        for name in ("chosen", "rejected"):
            ids = np.full((self.rows, 16), 1, dtype=np.int64)
            labels, mask = np.full((self.rows, 16), -100, dtype=np.int64), np.zeros((self.rows, 16), dtype=np.int64)
            for row in range(self.rows):
                length = int(rng.integers(7, 16))
                start = int(rng.integers(2, VOCAB))
                tokens = (start + np.arange(length)) % VOCAB if name == "chosen" else rng.integers(2, VOCAB, length)
                ids[row, :length], mask[row, :length] = tokens, 1
                labels[row, 4:length] = tokens[4:]
            sides[name] = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return {**sides, "weights": np.ones(self.rows)}


def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens with our control tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from fledge.records.chat import default_template

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["hello there you are here", "user assistant system", "你好人民法院"] * 3, trainer)
    names = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=control[0], eos_token=control[0], pad_token=control[3]
    )
    names.add_special_tokens({"additional_special_tokens": control[1:3]})
    names.chat_template = default_template()
    return names
