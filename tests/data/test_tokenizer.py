"""The tokenizer: gives back what it was given, is the same each time, and loads elsewhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.core.artifact import Artifact, Tokenizer
from fledge.data.tokens.packing import encode_plain
from fledge.data.tokens.stages import TrainTokenizer
from fledge.data.tokens.tokenizer import SPECIAL, bytes_per_token, sample_texts, train_bpe
from fledge.records.kinds import Document

from .conftest import Runner, chinese, corpus, digests, english, talk, write


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe([d.text for d in corpus(1, 60)], 1000)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    (ids,) = encode_plain(tokenizer, [text])
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_come_first_and_the_bytes_are_all_there(tokenizer: Any) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() == 1000
    (ids,) = encode_plain(tokenizer, ["\x00\x7f ÿ 龘 𠀀 🦆"])
    assert tokenizer.decode(ids) == "\x00\x7f ÿ 龘 𠀀 🦆"


def test_digits_stand_alone_and_words_take_their_space(tokenizer: Any) -> None:
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("in 2026, 第12条 rivers")]
    assert pieces == ["in", "Ġ", "2", "0", "2", "6", ",", "Ġç¬¬", "1", "2", "æĿ¡", "Ġrivers"]


def test_training_does_not_depend_on_the_order_of_rows_and_repeats(tmp_path: Path, run: Runner) -> None:
    rows = corpus(2, 60)
    stage = TrainTokenizer(data=["a", "b"], vocab_size=600)
    shuffled = random.Random(0).sample(rows, len(rows))
    outputs = []
    for name, (a, b) in {"x": (rows[:30], rows[30:]), "y": (shuffled[:45], shuffled[45:])}.items():
        inputs = {"a": write(tmp_path / f"{name}a", a), "b": write(tmp_path / f"{name}b", b)}
        outputs.append(digests(run(stage, inputs).path))
    assert outputs[0] == outputs[1]
    assert set(outputs[0]) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "report.json"}


def test_metrics_say_bytes_per_token_by_language(tmp_path: Path, run: Runner) -> None:
    rows = corpus(3, 80)
    made = run(TrainTokenizer(data=["a"], vocab_size=800), {"a": write(tmp_path / "a", rows)})
    assert isinstance(made, Tokenizer)
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(made.path / "tokenizer.json"))
    for language in ("en", "zh"):
        texts = [row.text for row in rows if row.language == language]
        tokens = sum(len(fast.encode(text).ids) for text in texts)
        expected = sum(len(text.encode()) for text in texts) / tokens
        assert made.metrics["bytes_per_token"][language] == pytest.approx(expected, abs=1e-3)
        assert expected > 2, "it has learned something of either language"
    assert any(event.name == "rate/tokenizer.train" for event in run.events)


def test_a_sample_is_a_share_of_every_input_and_a_larger_one_holds_it(tmp_path: Path) -> None:
    data = [write(tmp_path / "a", corpus(4, 100)), write(tmp_path / "b", [talk("hi", english(random.Random(0)))])]
    everything, half, some = (sample_texts(data, n) for n in (10**9, 60_000, 20_000))
    assert set(some.texts) < set(half.texts) < set(everything.texts)
    assert len(everything.texts) == 102
    assert some.bytes < half.bytes < everything.bytes and abs(half.bytes - 60_000) < 20_000


def test_it_loads_with_transformers_as_it_is(tmp_path: Path, run: Runner) -> None:
    from transformers import AutoTokenizer

    made = run(TrainTokenizer(data=["a"], vocab_size=500), {"a": write(tmp_path / "a", corpus(5, 20))})
    loaded = AutoTokenizer.from_pretrained(made.path)
    assert loaded.is_fast and len(loaded) == 500
    assert (loaded.eos_token, loaded.pad_token, loaded.pad_token_id) == ("<|endoftext|>", "<|pad|>", 3)
    assert loaded.bos_token is None and loaded.unk_token is None
    assert {"<|im_start|>", "<|im_end|>"} <= set(loaded.all_special_tokens)
    text = english(random.Random(0)) + chinese(random.Random(1)) + "\n  cafe\u0301 ！"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded(text)["input_ids"] == next(encode_plain(loaded, [text]))
    ids = loaded.apply_chat_template([{"role": "user", "content": "你好"}], add_generation_prompt=True)["input_ids"]
    assert ids[0] == 1 and 2 in ids
    assert loaded.chat_template == (made.path / "chat_template.jinja").read_text(encoding="utf-8")
    assert json.loads((made.path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_bytes_per_token_counts_utf8() -> None:
    plain = train_bpe(["a"], 261)
    assert bytes_per_token(plain, ["abcd", "你好"]) == 1.0, "nothing merged: a token a byte"


def test_texts_of_any_kind_of_record_will_do(tmp_path: Path) -> None:
    folder: Artifact = write(tmp_path / "a", [Document("x" * 10), Document("x" * 10, "other")])
    assert sample_texts([folder], 100).texts == ["x" * 10] * 2
