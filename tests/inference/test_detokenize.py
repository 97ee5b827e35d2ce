"""Text comes in whole characters, and never past a stop string."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fledge.inference.detokenize import HALF, Detokenizer, StopStrings

TEXT = "Hello 你好，世界！ 👩‍👩‍👧 family, naïve café — 龘 end"


def test_never_half_a_character(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    ids = backend.encode(TEXT).ids
    detokenizer = Detokenizer(backend)
    parts = [detokenizer.add([id]) for id in ids] + [detokenizer.flush()]
    assert "".join(parts) == TEXT
    assert not any(HALF in part for part in parts)
    assert "你" in parts and "" in parts  # its three bytes came as one character


def test_tokens_may_come_several_at_a_time(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    ids = backend.encode(TEXT).ids
    for seed in range(20):
        rng, detokenizer, text, at = random.Random(seed), Detokenizer(backend), "", 0
        while at < len(ids):
            step = rng.randint(1, 7)
            text += detokenizer.add(ids[at : at + step])
            at += step
        assert text + detokenizer.flush() == TEXT


def test_a_character_cut_short_shows_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer.backend_tokenizer.encode("好").ids
    detokenizer = Detokenizer(tokenizer.backend_tokenizer)
    assert [detokenizer.add([id]) for id in ids[:2]] == ["", ""]
    assert set(detokenizer.flush()) == {HALF}
    assert detokenizer.flush() == ""


def test_control_tokens_have_no_text(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer.backend_tokenizer)
    ids = [1, *tokenizer.backend_tokenizer.encode("hi").ids, 2]
    assert "".join(detokenizer.add([id]) for id in ids) == "hi"


def test_spaces_of_a_metaspace_tokenizer_survive() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(["the cat sat on the mat"] * 5, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    ids = backend.encode("the cat sat").ids
    detokenizer = Detokenizer(backend)
    assert "".join(detokenizer.add([id]) for id in ids) == "the cat sat"


def byte_fallback() -> Tokenizer:
    """LLaMA's manner: pieces with ▁ for a space, bytes for what has no piece, the first space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "▁Hello", "▁world", "好", "!"]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def as_bytes(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@pytest.mark.parametrize(
    "ids",
    [
        [260, 261, 263],
        [260, *as_bytes("你"), 262, *as_bytes("👩‍👩‍👧"), 261],
        [*as_bytes("龘"), 259, 260],
        [260, 2, 261, 1, 1, 261],  # control tokens between: no space may be lost
    ],
    ids=["pieces", "bytes", "bytes first", "control tokens"],
)
def test_byte_fallback(ids: list[int]) -> None:
    backend = byte_fallback()
    detokenizer = Detokenizer(backend)
    parts = [detokenizer.add([id]) for id in ids] + [detokenizer.flush()]
    assert "".join(parts) == backend.decode(ids) and not any(HALF in part for part in parts)


def test_bytes_that_make_no_character_show_and_do_not_stop_the_rest() -> None:
    backend = byte_fallback()
    ids = [260, *as_bytes("好")[:2], 261, *as_bytes("好")]
    detokenizer = Detokenizer(backend)
    text = "".join(detokenizer.add([id]) for id in ids) + detokenizer.flush()
    assert text == backend.decode(ids) and text.startswith("Hello") and text.endswith("world好") and HALF in text


@pytest.mark.parametrize("text", ["👩‍👩‍👧", "👨🏽‍🚀 🏳️‍🌈", "🇨🇳🇫🇷", "é́", "한국어", "𠮷野家", "ไทย", "١٢٣"])
def test_joined_and_combined_characters_come_whole(tokenizer: Any, text: str) -> None:
    backend = tokenizer.backend_tokenizer
    ids = backend.encode(text).ids
    detokenizer = Detokenizer(backend)
    parts = [detokenizer.add([id]) for id in ids]
    assert "".join(parts) == text and detokenizer.flush() == ""
    assert not any(HALF in part for part in parts) and len(ids) > len(text)


@pytest.mark.parametrize("stop", ["停止", "！结", "👩‍👧", "end\n"])
def test_stop_strings_over_the_borders_of_tokens(tokenizer: Any, stop: str) -> None:
    """Every token is a byte or a few letters: the stop begins and ends inside characters' tokens."""
    text = f"前文 before {stop} after"
    detokenizer, stops, out = Detokenizer(tokenizer.backend_tokenizer), StopStrings([stop]), ""
    for id in tokenizer.backend_tokenizer.encode(text).ids:
        out += stops.add(detokenizer.add([id]))
        if stops.stopped:
            break
    assert stops.stopped and out == "前文 before "


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_stop_string_across_borders(size: int) -> None:
    text, stops = "one two </s two </s> three", StopStrings(["</s>", "three"])
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    given_out = ""
    for piece in pieces:
        given_out += stops.add(piece)
        assert "one two </s two ".startswith(given_out)
    assert stops.stopped and given_out == "one two </s two "


def test_what_was_held_back_comes_when_nothing_follows() -> None:
    stops = StopStrings(["</s>"])
    assert stops.add("a</") == "a"
    assert stops.flush() == "</"
    assert not stops.stopped


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_any_pieces_any_stops(pieces: list[str], stops: list[str]) -> None:
    whole, filter = "".join(pieces), StopStrings(stops)
    out = ""
    for piece in pieces:
        out += filter.add(piece)
        if filter.stopped:
            break
    out += filter.flush()
    ends = [at + len(stop) for stop in stops if (at := whole.find(stop)) >= 0]
    if not ends:
        assert out == whole and not filter.stopped
    else:
        assert filter.stopped and whole.startswith(out) and not any(stop in out for stop in stops)
