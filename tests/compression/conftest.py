"""A small model with a chat tokenizer in a folder, made once, and a way to run a stage without the runner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from fledge.compression.fidelity import TEXTS
from fledge.core.artifact import Artifact
from fledge.core.events import Emitter
from fledge.core.job import Job
from fledge.core.stage import Execution, Stage
from fledge.data.tokens.tokenizer import save_tokenizer, train_bpe
from fledge.models.build import build_model
from fledge.models.load import load_tokenizer
from fledge.models.save import save_model
from fledge.models.shape import ModelShape


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that fledge trains, 600 tokens from a few texts in both languages."""
    save_tokenizer(train_bpe(TEXTS, 600), folder)
    return load_tokenizer(folder)


def make_folder(folder: Path, tie: bool = True, extra_ids: int = 0) -> Path:
    """A LLaMA with grouped queries whose logits are not flat, saved with its tokenizer."""
    tokenizer = make_tokenizer(folder)
    shape = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, context=128, tie_embeddings=tie)
    model = build_model(shape.resolve(len(tokenizer) + extra_ids), 1, tokenizer)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output layer is its embedding; three ids of its vocabulary belong to no token."""
    return make_folder(tmp_path_factory.mktemp("tied"), extra_ids=3)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an output layer of its own."""
    return make_folder(tmp_path_factory.mktemp("untied"), tie=False)


def run_stage(folder: Path, stage: Stage, **inputs: Artifact) -> Any:
    """The stage's result; its output in a place of its own below `folder`."""
    place = folder / f"job{len(list(folder.glob('job*')))}"
    (place / "out").mkdir(parents=True)
    (place / "work").mkdir()
    by_text = {getattr(stage, name).text: artifact for name, artifact in inputs.items()}
    events = Emitter("test", 0, lambda _: None)
    return stage.run(Job("test", place / "out", place / "work", 0, Execution(), events, by_text))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """`run(stage, model=artifact)`: the stage's result, its output in a folder of its own each time."""

    return partial(run_stage, tmp_path)
