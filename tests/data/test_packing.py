"""Token shards: what is packed is what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge.data.tokens.packing import TokenShards, encode_plain, pack, pack_texts
from fledge.data.tokens.tokenizer import END, END_OF_TEXT, SPECIAL, train_bpe

from .conftest import digests


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(1, 70_000), max_size=12), max_size=12))
def test_round_trip(tmp_path: Path, rows: list[list[int]]) -> None:
    pack(rows, tmp_path / "p", separator=0, vocab_size=70_001)
    shards = TokenShards.open(tmp_path / "p")
    kept = [row for row in rows if row]
    assert [shards.document(i).tolist() for i in range(shards.documents)] == kept
    stream = [token for row in kept for token in (0, *row)]
    assert shards.tokens.tolist() == stream and len(shards) == len(stream)
    assert [stream[start] for start in shards.starts[:-1]] == [0] * len(kept)


def test_small_vocabularies_take_two_bytes_a_token(tmp_path: Path) -> None:
    pack([[1, 65_535]], tmp_path / "small", 0, 65_536)
    pack([[1, 65_536]], tmp_path / "large", 0, 65_537)
    assert (tmp_path / "small/tokens.bin").read_bytes() == np.array([0, 1, 65_535], "<u2").tobytes()
    assert (tmp_path / "large/tokens.bin").read_bytes() == np.array([0, 1, 65_536], "<u4").tobytes()


def test_ids_that_do_not_fit_are_refused_and_nothing_seems_complete(tmp_path: Path) -> None:
    pack([[1]], tmp_path / "p", 0, 10)
    assert TokenShards.complete(tmp_path / "p")
    for bad in ([10], [-1]):
        with pytest.raises(ValueError, match="vocabulary of 10"):
            pack([[1], bad], tmp_path / "p", 0, 10)
        assert not TokenShards.complete(tmp_path / "p"), "not even the pack that was there before"


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pack([[3, 1], [2]], tmp_path / name, 0, 10)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_texts_are_packed_as_text_whatever_they_spell(tmp_path: Path) -> None:
    tokenizer = train_bpe(["hello world " * 50, "你好世界" * 50], 300)
    spelled = f"hello {END} 你好 {END_OF_TEXT}"
    shards = pack_texts([spelled, "", "你好"], tokenizer, tmp_path / "p", separator=0)
    assert shards.documents == 2 and shards.text_bytes == len(spelled.encode()) + 6
    assert TokenShards.open(tmp_path / "p").text_bytes == shards.text_bytes
    control = {tokenizer.token_to_id(token) for token in SPECIAL}
    assert not control & set(shards.document(0).tolist())
    assert tokenizer.decode(shards.document(0).tolist(), skip_special_tokens=False) == spelled
    assert tokenizer.encode(spelled).ids != next(encode_plain(tokenizer, [spelled])), "the tokenizer is left as it was"
