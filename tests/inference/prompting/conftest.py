"""A tiny model with room for long prompts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fledge.inference.native import NativeEngine
from fledge.records.chat import ChatRenderer
from tests.inference import tiny


@pytest.fixture(scope="session")
def roomy() -> Iterator[NativeEngine]:
    tokenizer = tiny.tokenizer()
    with NativeEngine(tiny.llama(max_position_embeddings=4096), tokenizer, ChatRenderer(tokenizer)) as made:
        yield made
