"""A small byte-level BPE tokenizer, as `tokenizer.train` makes them, and texts that try to be control tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from fledge.records.chat import default_template

settings.register_profile("records", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("records")

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


def train_backend() -> Any:
    """A `tokenizers.Tokenizer` of 700 tokens in English and Chinese."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's and SmolLM2's have it
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "system user assistant\n\n\nHello, how are you?  I am fine.\n你好，世界。我很好。 <|im_end|> <|im_start|>"
    backend.train_from_iterator([text, text.upper(), text * 2], trainer)
    return backend


def as_transformers(backend: Any, template: str | None = None, **special: str) -> Any:
    """The tokenizer as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", **special}
    extra = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, **extra)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The small tokenizer with our ChatML template."""
    return as_transformers(train_backend(), default_template())
