"""What masks, spans and denoising do to rows: their shares, their lengths, what they leave alone, and their inverse."""

from __future__ import annotations

from itertools import pairwise
from math import comb, lgamma, log, log1p
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from fledge.data.tokens.batches import Batch
from fledge.data.tokens.corruption.chance import Corrupted, chosen, documents_of, uniforms
from fledge.data.tokens.corruption.denoising import Denoising, infilled, permuted, poisson
from fledge.data.tokens.corruption.masking import EveryTokenOnce, Masking
from fledge.data.tokens.corruption.spans import SpanCorruption, lengths, noise_mask, restore, row_length, segments
from fledge.data.tokens.corruption.surfaces import Surfaces
from fledge.data.tokens.tokenizer import train_bpe, train_unigram_tokenizer, train_wordpiece

MASK, SIZE = 3, 1000
SPECIAL = np.arange(SIZE) < 4


def rows(count: int = 8, length: int = 512, seed: int = 0, specials: bool = True) -> Batch:
    """Rows of random tokens with a separator (0) where documents begin, and padding (1) behind the last row's half."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, SIZE, (count, length))
    positions = np.tile(np.arange(length), (count, 1))
    for row in range(count):
        start = int(rng.integers(length // 4, length // 2))
        positions[row, start:] -= start
        if specials:
            ids[row, [0, start]] = 0
    return Batch(ids, ids.copy(), positions)


def within(count: int, of: int, share: float) -> bool:
    """Whether a binomial count lies where it does in all but two of a million draws: its tails, summed exactly."""
    k = np.arange(of + 1)
    logs = [lgamma(of + 1) - lgamma(i + 1) - lgamma(of - i + 1) for i in k.tolist()]
    chances = np.exp(np.array(logs) + k * log(share) + (of - k) * log1p(-share))
    return float(chances[: count + 1].sum()) > 1e-6 and float(chances[count:].sum()) > 1e-6


def test_masks_are_fifteen_per_cent_and_80_10_10() -> None:
    batch = rows(32)
    made = Masking(MASK, SPECIAL, seed=5)(batch, 7)
    ids, labels, found = batch.input_ids, made["labels"], made["input_ids"]
    selected = labels >= 0
    ordinary = ~SPECIAL[ids]
    assert within(int(selected.sum()), int(ordinary.sum()), 0.15)
    assert not selected[~ordinary].any() and (found[~selected] == ids[~selected]).all()
    assert (labels[selected] == ids[selected]).all(), "what is predicted is what stood there, kept and random ones too"
    n = int(selected.sum())
    masked, kept = found[selected] == MASK, found[selected] == ids[selected]
    other = found[selected][~masked & ~kept]
    same = 1 / (SIZE - 4)  # a random token may be the one that was there
    assert within(int(masked.sum()), n, 0.8)
    assert within(int(kept.sum()), n, 0.1 + 0.1 * same) and within(len(other), n, 0.1 * (1 - same))
    assert not SPECIAL[other].any() and len(set(other.tolist())) > 0.8 * len(other), "any ordinary token"


def test_masks_differ_between_epochs_and_repeat_with_the_step() -> None:
    class Same:
        """A source of one batch an epoch."""

        def __len__(self) -> int:
            return 1

        def batch(self, step: int) -> Batch:
            return rows(4)

    source = Corrupted(Same(), Masking(MASK, SPECIAL, seed=1))
    first, second, again = source.batch(0), source.batch(1), Corrupted(Same(), Masking(MASK, SPECIAL, 1)).batch(0)
    assert all((first[name] == again[name]).all() for name in first), "a pure function of rows, seed and step"
    both = ((first["labels"] >= 0) & (second["labels"] >= 0)).sum() / (first["labels"] >= 0).sum()
    assert 0.08 < both < 0.23, "drawn anew: they meet by chance alone"
    other = Corrupted(Same(), Masking(MASK, SPECIAL, seed=2)).batch(0)
    assert (other["labels"] != first["labels"]).any()


def test_padding_is_never_masked() -> None:
    batch = rows(4, 64, specials=False)
    attended = np.ones((4, 64), dtype=np.int64)
    attended[:, 40:] = 0
    padded = Batch(batch.input_ids, batch.labels, batch.position_ids, attended)
    for step in range(30):
        made = Masking(MASK, SPECIAL, 0, rate=0.5)(padded, step)
        assert (made["labels"][:, 40:] == -100).all() and (made["attention_mask"] == attended).all()
        assert (made["input_ids"][:, 40:] == batch.input_ids[:, 40:]).all()


def test_for_measuring_every_token_is_masked_exactly_once() -> None:
    batch = rows(6, 128)
    probe = EveryTokenOnce(Masking(MASK, SPECIAL, 0), 7)
    folds = [probe(batch, 14 + fold) for fold in range(7)]
    count = sum((made["labels"] >= 0).astype(int) for made in folds)
    assert (count == ~SPECIAL[batch.input_ids]).all()
    assert all((made["input_ids"][made["labels"] >= 0] == MASK).all() for made in folds)


TEXT = "Unbelievably, he isn't there: 3.14 yes! 今天人民法院依法作出判决。北京大学很好！「真的？」他说。\nNew line"
WORDS = {"今天", "人民法院", "依法", "作出", "判决", "北京大学", "很", "好"}


@pytest.fixture(scope="module", params=["bpe", "unigram", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Tokenizers that know few pieces, so that words and characters are cut."""
    corpus = ["Unbelievable he is not there", "yes line he there", "人民法院 北京 天 他说 真的"] * 4
    train = {"bpe": train_bpe, "unigram": train_unigram_tokenizer, "wordpiece": train_wordpiece}[request.param]
    return train(corpus, 400, "none", ["[MASK]"])


def pieces(surfaces: Surfaces, ids: np.ndarray, begins: np.ndarray) -> list[str]:
    """The text of every stretch that begins where `begins` says."""
    starts = [0, *(np.flatnonzero(begins[1:]) + 1).tolist(), len(ids)]
    found = [b"".join(surfaces.bytes[i] for i in ids[a:b]).decode("utf-8", "replace") for a, b in pairwise(starts)]
    return [piece.strip() for piece in found]


def test_words_are_whole_in_english_and_in_chinese(tokenizer: Tokenizer) -> None:
    surfaces = Surfaces(tokenizer)
    ids = np.array(tokenizer.encode(TEXT, add_special_tokens=False).ids)
    found = pieces(surfaces, ids, surfaces.word_begins(ids[None])[0])
    assert {"Unbelievably", "he", "isn", "there", "yes", "!", "New", "line"} <= set(found)
    if surfaces.joined:  # most of the characters are unknown to it, and unknown ones are special
        assert "\0" in found
    else:
        assert set(found) >= WORDS
    masked = Masking(4, surfaces.special, 3, rate=0.4, keep=0.0, random=0.0, surfaces=surfaces)
    positions = np.arange(len(ids))[None]
    for step in range(20):
        labels = masked(Batch(ids[None], ids[None], positions), step)["labels"][0]
        words = surfaces.word_begins(ids[None])[0].cumsum()
        for word in np.unique(words):
            chosen_ = (labels[words == word] >= 0)[~surfaces.special[ids[words == word]]]
            assert not len(chosen_) or chosen_.all() or not chosen_.any(), "a word is masked whole or not at all"


def test_sentences_end_in_english_and_in_chinese(tokenizer: Tokenizer) -> None:
    surfaces = Surfaces(tokenizer)
    ids = np.array(tokenizer.encode(TEXT, add_special_tokens=False).ids)
    found = pieces(surfaces, ids, surfaces.sentence_begins(ids[None])[0])
    if surfaces.joined:  # WordPiece keeps no line breaks
        assert len(found) >= 4
        return
    assert [sentence[-2:] for sentence in found] == ["s!", "决。", "好！", "？」", "说。", "ne"]
    assert found[0].startswith("Unbelievably, he isn't there: 3.14"), "no sentence ends inside a number"


def test_a_special_token_ends_a_word() -> None:
    plain = Tokenizer(models.WordLevel({"[SEP]": 0, "a": 1, "b": 2}, unk_token="[SEP]"))  # "ab[SEP]b"
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.add_special_tokens(["[SEP]"])
    begins = Surfaces(plain).word_begins(np.array([[1, 2, 0, 2]]))
    assert begins.tolist() == [[True, False, True, True]]


# --- spans -----------------------------------------------------------------------------------------------------------


def test_lengths_are_the_papers() -> None:
    """Raffel et al. (2020): inputs of 512 tokens with 15 % in spans of 3 need rows of 568, and targets of 114."""
    row = row_length(512)
    counts = lengths(row)
    assert (row, counts.inputs, counts.targets) == (568, 512, 114)
    assert lengths(row + 1).inputs > 512


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(4, 200), st.floats(0.05, 0.7), st.floats(1.0, 10.0))
def test_lengths_hold_for_any_row(inputs: int, rate: float, mean: float) -> None:
    row = row_length(inputs, rate, mean)
    counts = lengths(row, rate, mean)
    assert counts.inputs <= inputs and 1 <= counts.spans <= min(counts.noise, row - counts.noise)
    noise = noise_mask(3, counts, 1, 2)
    assert (noise.sum(axis=1) == counts.noise).all() and not noise[:, 0].any() and noise[:, -1].all()
    starts = noise[:, 1:] & ~noise[:, :-1]
    assert (starts.sum(axis=1) == counts.spans).all(), "spans never touch"


def test_every_way_of_cutting_is_as_likely() -> None:
    found = segments(5, 3, uniforms((6000, 4), 9))
    assert (found.sum(axis=1) == 5).all() and (found >= 1).all()
    ways, counts = np.unique(found, axis=0, return_counts=True)
    assert len(ways) == comb(4, 2) and all(within(int(c), 6000, 1 / 6) for c in counts)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(8, 120), st.integers(0, 50), st.floats(0.1, 0.5), st.floats(1.0, 5.0))
def test_spans_are_put_back_exactly(length: int, step: int, rate: float, mean: float) -> None:
    sentinels, end, start = list(range(SIZE, SIZE + 100)), 2, 1
    batch = rows(3, length)
    made = SpanCorruption(sentinels, end, start, 4, rate, mean)(batch, step)
    counts = lengths(length, rate, mean)
    assert made["input_ids"].shape == (3, counts.inputs) == made["documents"].shape
    assert made["labels"].shape == (3, counts.targets) == made["decoder_documents"].shape
    for row in range(3):
        inputs, targets = made["input_ids"][row], made["labels"][row]
        assert inputs[-1] == end == targets[-1]
        assert restore(inputs[:-1].tolist(), targets[:-1].tolist(), sentinels) == batch.input_ids[row].tolist()
        used = [token for token in inputs.tolist() if token >= SIZE]
        assert used == sentinels[: counts.spans] == [token for token in targets.tolist() if token >= SIZE]
    assert (made["decoder_input_ids"][:, 0] == start).all()
    assert (made["decoder_input_ids"][:, 1:] == made["labels"][:, :-1]).all()


def test_tokens_keep_their_documents() -> None:
    batch = rows(4, 60, specials=False)
    documents = documents_of(batch.position_ids)
    batch = Batch(documents * 100 + 4 + batch.position_ids, batch.labels, batch.position_ids)  # a token names its own
    made = SpanCorruption(range(SIZE, SIZE + 100), 2, 1, 0)(batch, 3)
    for ids, own in ((made["input_ids"], made["documents"]), (made["labels"], made["decoder_documents"])):
        told = (ids > 99) & (ids < SIZE)
        agree = (ids // 100 == own)[told].mean()
        assert agree > 0.9, "all but the part of a span that reaches into the next document"
    assert (np.diff(made["documents"], axis=1) >= 0).all() and (np.diff(made["decoder_documents"], axis=1) >= 0).all()


# --- denoising -------------------------------------------------------------------------------------------------------


def test_poisson_is_poisson() -> None:
    found = poisson(3.0, uniforms(40_000, 3))
    assert abs(found.mean() - 3) < 0.05 and abs(found.var() - 3) < 0.12
    assert within(int((found == 0).sum()), 40_000, float(np.exp(-3)))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 200), st.integers(0, 40), st.floats(0.0, 0.95), st.floats(1.0, 5.0))
def test_infilling_hides_the_share_and_no_more(length: int, seed: int, rate: float, mean: float) -> None:
    ids = np.arange(10, 10 + length)
    found = infilled(ids, rate, mean, MASK, seed)
    left = found[found != MASK]
    assert len(left) == length - round(rate * length) and len(found) <= max(length, 1)
    assert (np.diff(left) > 0).all(), "what is left stands in its order"


def test_sentences_are_permuted_whole() -> None:
    ids, begins = np.arange(12), np.isin(np.arange(12), [0, 3, 4, 9])
    orders = set()
    for seed in range(40):
        found = permuted(ids, begins, seed)
        assert sorted(found.tolist()) == list(range(12))
        starts = [place for place in range(12) if place == 0 or found[place] != found[place - 1] + 1]
        assert {int(found[place]) for place in starts} <= {0, 3, 4, 9}
        orders.add(tuple(found.tolist()))
    assert len(orders) > 12


class Sentences:
    """A sentence begins with every even token."""

    def sentence_begins(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(ids % 2 == 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"infill": 0.0, "token_mask": 0.3}, {"infill": 0.0, "token_delete": 0.3}, {"infill": 0.0, "rotate": True}],
)
def test_a_denoised_document_is_asked_for_whole(options: dict[str, Any]) -> None:
    batch = rows(4, 80)
    made = Denoising(MASK, 1, SPECIAL, 5, surfaces=Sentences(), **options)(batch, 2)  # type: ignore[arg-type]
    assert (made["decoder_input_ids"] == batch.input_ids).all()
    assert (made["labels"][:, :-1] == batch.input_ids[:, 1:]).all() and (made["labels"][:, -1] == -100).all()
    assert (made["decoder_documents"] == documents_of(batch.position_ids)).all()
    for row in range(4):
        for number in (1, 2):
            before = batch.input_ids[row][made["decoder_documents"][row] == number]
            after = made["input_ids"][row][made["documents"][row] == number]
            assert after[0] == before[0] == 0, "the separator stays in front"
            kept = [token for token in after.tolist() if token != MASK]
            assert set(kept) <= set(before.tolist()) and len(after) <= len(before)
            if options.get("rotate"):
                assert sorted(kept) == sorted(before.tolist())
            else:
                assert 0.4 * len(before) < len(kept) < 0.95 * len(before)
    assert (made["input_ids"][made["documents"] == 0] == 1).all(), "padding at the end"
    again = Denoising(MASK, 1, SPECIAL, 5, surfaces=Sentences(), **options)(batch, 2)  # type: ignore[arg-type]
    assert (again["input_ids"] == made["input_ids"]).all()


def test_chosen_places_are_as_many_as_asked() -> None:
    keys = uniforms((500, 7), 1)
    assert (chosen(7, 3, keys).sum(axis=1) == 3).all() and not chosen(7, 0, keys).any()
    assert all(within(int(c), 500, 3 / 7) for c in chosen(7, 3, keys).sum(axis=0))
