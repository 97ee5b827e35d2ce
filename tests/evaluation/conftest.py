"""Small real model folders and held-out data, made once."""

from __future__ import annotations

from typing import Any

import pytest

from fledge.core.artifact import Artifact, Conversations, Model, Preferences, Prompts, RewardModel
from fledge.records.kinds import Answer, Conversation, Message, Preference, Prompt
from fledge.records.shards import ShardWriter

ENGLISH = ["how are you today?", "I am well, and what did you do? " * 9, "the cat sat on the mat"]
CHINESE = ["你好，今天天气怎么样？", "今天天气很好，我们去公园走走。"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """References by name: two models, a reward model, conversations, preferences, prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.inference.tiny import llama, save

    folder = tmp_path_factory.mktemp("world")
    save(folder / "base", llama(0))
    save(folder / "tuned", llama(1))
    torch.manual_seed(2)
    config: dict[str, Any] = LlamaConfig(**llama(0).config.to_dict()).to_dict() | {"num_labels": 1, "pad_token_id": 3}
    save(folder / "judge", LlamaForSequenceClassification(LlamaConfig(**config)))
    talks = [(text, lang) for lang, texts in (("en", ENGLISH), ("zh", CHINESE)) for text in texts]
    with ShardWriter(folder / "talk", "conversations") as out:
        for text, lang in talks:
            out.write(Conversation((Message("user", "hello"), Message("assistant", text)), language=lang))
    with ShardWriter(folder / "pairs", "preferences") as out:
        for text, lang in talks:
            answers = (Answer(text, 1), Answer(text[::-1] + "!", 2))
            out.write(Preference((Message("user", "hello"),), answers, language=lang))
    with ShardWriter(folder / "questions", "prompts") as out:
        out.write(Prompt((Message("user", "who are you?"),), "fledge"))
    return {
        "base": Model(folder / "base"),
        "tuned": Model(folder / "tuned"),
        "judge": RewardModel(folder / "judge"),
        "talk": Conversations(folder / "talk"),
        "pairs": Preferences(folder / "pairs"),
        "questions": Prompts(folder / "questions"),
    }
