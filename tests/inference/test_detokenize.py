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
