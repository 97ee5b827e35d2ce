"""One tiny model and its engine for all tests of this floor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fledge.inference.native import NativeEngine
from fledge.records.chat import ChatRenderer
from tests.inference import tiny


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny.llama()


@pytest.fixture(scope="session")
def engine(model: Any, tokenizer: Any) -> Iterator[NativeEngine]:
    with NativeEngine(model, tokenizer, ChatRenderer(tokenizer)) as made:
        yield made
