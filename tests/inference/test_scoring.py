"""Log-probabilities, rewards and vectors against one plain forward pass for each row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForSequenceClassification

from fledge.core.errors import FledgeError
from fledge.inference import scoring
from fledge.inference.engine import Request
from fledge.inference.native import NativeEngine
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation, Message
from tests.inference import tiny


def plain(model: Any, prompt: list[int], continuation: list[int]) -> tuple[list[float], list[bool]]:
    """One row, no batch, no branches."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + continuation]), use_cache=False).logits[0].float()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    tokens = torch.tensor(continuation)
    return logprobs.gather(-1, tokens[:, None])[:, 0].tolist(), (logprobs.argmax(-1) == tokens).tolist()


def items(count: int) -> list[tuple[list[int], list[int]]]:
    """Questions of one to five answers, of all lengths, in a shuffled order."""
    rng = random.Random(0)
    words = lambda low, high: [rng.randrange(4, 330) for _ in range(rng.randint(low, high))]  # noqa: E731
    rows = [(prompt, words(1, 12)) for prompt in (words(1, 60) for _ in range(count)) for _ in range(rng.randint(1, 5))]
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("limits", [(4096, 1 << 26, 2048), (64, 20_000, 40)], ids=["large batches", "small batches"])
def test_scores_equal_plain_forward_passes(
    engine: NativeEngine, model: Any, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int, int]
) -> None:
    for name, value in zip(("_BATCH_TOKENS", "_BATCH_LOGITS", "_ROW_TOKENS"), limits, strict=True):
        monkeypatch.setattr(scoring, name, value)
    rows = items(12)
    scored = engine.score([p for p, _ in rows], [c for _, c in rows])
    for (prompt, continuation), found in zip(rows, scored, strict=True):
        logprobs, greedy = plain(model, prompt, continuation)
        assert list(found.logprobs) == pytest.approx(logprobs, abs=2e-5)
        assert list(found.greedy) == greedy
        assert found.total == pytest.approx(sum(logprobs), abs=1e-4)


def test_a_model_without_positions_is_scored_a_continuation_a_row() -> None:
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=330, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, pad_token_id=3,
    )  # fmt: skip
    model = BloomForCausalLM(config).eval()
    rows = items(4)
    with NativeEngine(model, tiny.tokenizer()) as engine:
        scored = engine.score([p for p, _ in rows], [c for _, c in rows])
    for (prompt, continuation), found in zip(rows, scored, strict=True):
        assert list(found.logprobs) == pytest.approx(plain(model, prompt, continuation)[0], abs=5e-5)


def test_what_the_model_writes_is_greedy(engine: NativeEngine) -> None:
    asked = Request(prompt_ids=(5, 6, 7), temperature=0, max_new_tokens=10, stop_ids=())
    written = engine.generate([asked])[0].choice.token_ids
    assert all(engine.score([(5, 6, 7)], [written])[0].greedy)


def test_each_prompt_is_read_once(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = scoring._rows([[1, 2, 3]] * 3 + [[4]], [[5, 6], [7], [8, 9, 10], [11]])
    assert [(row.prompt, [place for place, _ in row.branches], row.length) for row in rows] == [
        ([4], [3], 1),
        ([1, 2, 3], [0, 1, 2], 6),
    ]


def test_scores_beyond_the_context_are_refused(engine: NativeEngine) -> None:
    with pytest.raises(FledgeError, match=r"item 1(.|\n)*257 tokens"):
        engine.score([[5], [5] * 250], [[6], [6] * 8])
    with pytest.raises(FledgeError, match="empty"):
        engine.score([[]], [[6]])


def test_embeddings_are_means_of_hidden_states(engine: NativeEngine, model: Any) -> None:
    texts = ["Hello", "你好，世界", "a"]
    for text, vector in zip(texts, engine.embed(texts), strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([engine.encode(text)]), output_hidden_states=True).hidden_states[-1]
        assert vector == pytest.approx(hidden[0].mean(0).tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = tiny.llama().config.to_dict() | {"num_labels": 1, "architectures": None}
    return tiny.save(tmp_path_factory.mktemp("reward"), LlamaForSequenceClassification(LlamaConfig(**shape)))


def test_rewards_are_the_head_at_the_last_token(reward_folder: Path) -> None:
    conversations = [
        Conversation((Message("user", "Hello " * n), Message("assistant", "你好" * (4 - n)))) for n in range(1, 4)
    ]
    with NativeEngine.from_folder(reward_folder, reward=True, device="cpu") as judge:
        rewards = judge.reward(conversations)
        renderer = ChatRenderer(tiny.tokenizer())
        for conversation, value in zip(conversations, rewards, strict=True):
            ids = torch.tensor([renderer.render(conversation.messages).ids])
            with torch.no_grad():
                hidden = judge.model.model(ids).last_hidden_state[0, -1]
                assert value == pytest.approx(judge.model.score(hidden).item(), abs=1e-5)
        assert len(set(rewards)) == 3
        with pytest.raises(FledgeError, match="writes none"):
            judge.generate([Request(text="x")])[0].text  # noqa: B018


def test_a_language_model_gives_no_rewards(engine: NativeEngine) -> None:
    with pytest.raises(FledgeError, match="not a reward model"):
        engine.reward([Conversation((Message("user", "x"), Message("assistant", "y")))])
