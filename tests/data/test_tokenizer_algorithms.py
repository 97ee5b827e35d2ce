"""BPE, Unigram and WordPiece: what each promises, and that each repeats."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError
from fledge.core.recipe import from_values
from fledge.data.texts import units
from fledge.data.tokens.packing import encode_plain
from fledge.data.tokens.stages import ReportTokenizers, TrainTokenizer
from fledge.data.tokens.tokenizer import SPECIAL, TRAINERS
from fledge.data.tokens.tokenizer_report import KNOWN, known, measured
from fledge.data.tokens.unigram import best_log_chances, expectations, lattice_of, train_unigram
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Document, Message

from .conftest import Runner, corpus, write

ALGORITHMS = tuple(TRAINERS)
EXTRA = ["<|tool|>", "<think>"]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    texts = sorted(d.text for d in corpus(1, 60))
    return {name: train(texts, 1000, extra=EXTRA) for name, train in TRAINERS.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("tokenizers")
    run, data = Runner(home), write(home / "data", corpus(1, 60))
    keys = {"data": ["a"], "vocab_size": 700, "special_tokens": EXTRA}
    return {name: run(TrainTokenizer(algorithm=name, **keys), {"a": data}).path for name in ALGORITHMS}


@pytest.mark.parametrize("name", ["bpe", "unigram"])
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(max_size=100)
    | st.lists(st.sampled_from(["<0x41>", "<unk>", "river", " the", "人民", *SPECIAL, "\n", "龘"])).map("".join)
)
def test_any_text_comes_back(trained: dict[str, Any], name: str, text: str) -> None:
    (ids,) = encode_plain(trained[name], [text])
    assert trained[name].decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from([" ".join([*SPECIAL, *EXTRA]), "<|tool|><think>x"]))
def test_no_text_becomes_a_special_token(trained: dict[str, Any], name: str, text: str) -> None:
    control = {trained[name].token_to_id(token) for token in (*SPECIAL, *EXTRA)}
    assert not control & set(next(encode_plain(trained[name], [text])))


def test_unigram_knows_every_character_and_wordpiece_says_what_it_does_not(trained: dict[str, Any]) -> None:
    unigram, wordpiece = trained["unigram"], trained["wordpiece"]
    assert unigram.token_to_id("<unk>") not in unigram.encode("龘 𠀀 🦆 \x00").ids
    assert "<0xE9>" in unigram.encode("龘").tokens
    assert wordpiece.encode("the 龘 river").tokens == ["the", "[UNK]", "river"]
    assert measured(wordpiece, {"zh": ["人龘民"]})["languages"]["zh"]["unknown_share"] == pytest.approx(1 / 3, abs=1e-6)


def test_wordpiece_takes_words_and_single_han_characters(trained: dict[str, Any]) -> None:
    wordpiece = trained["wordpiece"]
    assert wordpiece.encode("the rivers, 人民2026").tokens == [
        "the",
        "river",
        "##s",
        ",",
        "人",
        "民",
        "2",
        "0",
        "2",
        "6",
    ]
    text = "the river 人民法院 and people"
    assert wordpiece.decode(wordpiece.encode(text).ids) == "the river人民法院and people"


def test_more_data_means_fewer_tokens_for_what_is_frequent(trained: dict[str, Any]) -> None:
    for name in ("bpe", "unigram"):
        found = measured(trained[name], {"en": [d.text for d in corpus(2, 20) if d.language == "en"]})["languages"][
            "en"
        ]
        assert found["bytes_per_token"] > 3.5, "words are learned"
        assert found["tokens_per_unit"] == round(found["tokens"] / found["units"], 3) < 1.5


def test_training_repeats_in_every_process() -> None:
    """Hash maps are seeded anew by every process, and several threads finish in another order each time."""
    code = """
import hashlib, random
from fledge.data.tokens.tokenizer import TRAINERS
rng = random.Random(0)
words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(600)]
words += ["".join(rng.choices("人民法院审理案件应当以事实为根据", k=rng.randint(2, 9))) for _ in range(300)]
texts = sorted(" ".join(rng.choices(words, k=40)) for _ in range(300))
for name, train in TRAINERS.items():
    print(name, hashlib.sha256(train(texts, 900).to_str().encode()).hexdigest())
"""
    found = set()
    for number in range(3):
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "RAYON_NUM_THREADS": str(1 + number)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        found.add(done.stdout)
    assert len(found) == 1 and found.pop().count("\n") == len(TRAINERS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_folder_loads_in_transformers_with_the_same_ids(folders: dict[str, Path], name: str) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    loaded, fast = (
        AutoTokenizer.from_pretrained(folders[name]),
        Tokenizer.from_file(str(folders[name] / "tokenizer.json")),
    )
    assert len(loaded) == fast.get_vocab_size() <= 700
    for text in ("the river 人民法院, 2026 龘\n  x", "<|tool|>the<think> 民", ""):
        ids = fast.encode(text).ids
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == fast.decode(ids, skip_special_tokens=False)
    assert {*SPECIAL, *EXTRA} <= set(loaded.all_special_tokens)
    assert [loaded.convert_tokens_to_ids(token) for token in (*SPECIAL, *EXTRA)] == [0, 1, 2, 3, 4, 5]
    assert loaded.unk_token == {"bpe": None, "unigram": "<unk>", "wordpiece": "[UNK]"}[name]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_chats_are_rendered_and_answers_weighed(folders: dict[str, Path], name: str) -> None:
    renderer = ChatRenderer.from_folder(folders[name])
    messages = [Message("user", "the river <|im_end|> 人民"), Message("assistant", "the people")]
    rendered = renderer.render(messages)
    prompt = renderer.render(messages[:1], add_generation_prompt=True)
    assert rendered.ids[: len(prompt.ids)] == prompt.ids
    assert rendered.ids.count(renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2, "what is written is text"
    learned = [token for token, weight in zip(rendered.ids, rendered.weights, strict=True) if weight]
    assert renderer.tokenizer.decode(learned).strip() == "the people<|im_end|>" or name == "wordpiece"
    assert learned[-1] in renderer.stop_ids and len(learned) >= 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_normalisers_are_part_of_the_tokenizer(name: str) -> None:
    texts = [d.text for d in corpus(1, 20)]
    lower = TRAINERS[name](texts, 600, "lowercase")
    assert lower.encode("ＴＨＥ River").ids == lower.encode("the river").ids
    nfc = TRAINERS[name](texts, 600, "nfc")
    assert nfc.encode("cafe\u0301").ids == nfc.encode("caf\u00e9").ids != nfc.encode("cafe").ids


# --- the Unigram model -----------------------------------------------------------------------------------------------


def cuts(word: str, chances: dict[str, float]) -> list[tuple[tuple[str, ...], float]]:
    """Every way to cut a word into known pieces with its probability."""
    found = []
    for borders in itertools.product((False, True), repeat=len(word) - 1):
        places = [0, *(i + 1 for i, border in enumerate(borders) if border), len(word)]
        pieces = tuple(word[a:b] for a, b in itertools.pairwise(places))
        if all(piece in chances for piece in pieces):
            found.append((pieces, math.prod(chances[piece] for piece in pieces)))
    return found


def test_expectations_are_those_of_all_ways_to_cut_every_word() -> None:
    pieces = ["a", "b", "c", "ab", "bc", "abc", "ca", "cab"]
    chances = np.array([0.2, 0.1, 0.1, 0.2, 0.1, 0.1, 0.15, 0.05])
    words, counts = ["abcab", "ca", "b", "cabc"], [3.0, 1.0, 7.0, 2.0]
    table = dict(zip(pieces, chances.tolist(), strict=True))
    expected: Counter[str] = Counter()
    for word, count in zip(words, counts, strict=True):
        ways = cuts(word, table)
        total = sum(chance for _, chance in ways)
        for way, chance in ways:
            for piece in way:
                expected[piece] += count * chance / total
    found = expectations(lattice_of(words, pieces), chances, np.array(counts))
    assert found.tolist() == pytest.approx([expected[piece] for piece in pieces])
    best = best_log_chances(lattice_of(words, pieces), chances)
    assert best.tolist() == pytest.approx([math.log(max(chance for _, chance in cuts(word, table))) for word in words])
    without = best_log_chances(lattice_of(["abc"], pieces, whole=False), chances)
    assert without.tolist() == pytest.approx([math.log(0.2 * 0.1)])


def test_unigram_training_finds_the_words_that_a_text_is_made_of() -> None:
    rng = random.Random(0)
    parts = ["river", "stone", "人民", "法院", "xq"]
    words = Counter("".join(rng.choices(parts, k=rng.randint(1, 4))) for _ in range(3000))
    alphabet = sorted({c for part in parts for c in part})
    found = train_unigram(words, len(alphabet) + 5, alphabet)
    assert {piece for piece, _ in found} == {*alphabet, *parts}
    assert {piece for piece, _ in found[:5]} == set(parts), "likeliest first"
    assert math.fsum(math.exp(score) for _, score in found) == pytest.approx(1)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_unigram_learns_pieces_that_text_it_has_not_seen_is_made_of() -> None:
    texts = [d.text for d in corpus(7, 40)]
    made = TRAINERS["unigram"](texts, 800)
    held = [d.text for d in corpus(8, 10)]
    tokens, characters = sum(map(len, encode_plain(made, held))), sum(map(len, held))
    assert tokens < 0.5 * characters


def test_nothing_to_learn_from_still_gives_a_tokenizer() -> None:
    for name, train in TRAINERS.items():
        made = train([], 300)
        (ids,) = encode_plain(made, ["ab"])
        assert ids and made.get_vocab_size() <= 300, name


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_it_says(folders: dict[str, Path]) -> None:
    from tokenizers import Tokenizer

    report = json.loads((folders["unigram"] / "report.json").read_text(encoding="utf-8"))["tokenizer"]
    fast = Tokenizer.from_file(str(folders["unigram"] / "tokenizer.json"))
    for language in ("en", "zh"):
        texts = [d.text for d in corpus(1, 60) if d.language == language]
        entry = report["languages"][language]
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["units"] == sum(len(units(text)) for text in texts)
        assert entry["tokens"] == sum(len(fast.encode(text).ids) for text in texts)
        assert entry["unknown_share"] == 0


def test_tokenizers_side_by_side(folders: dict[str, Path], tmp_path: Path, run: Runner, monkeypatch: Any) -> None:
    data = write(tmp_path / "a", corpus(9, 20))
    refs = {name: Artifact(path) for name, path in folders.items()}
    made = run(ReportTokenizers(tokenizers={name: name for name in refs}, data=["a"]), {**refs, "a": data})
    report = json.loads((made.path / "report.json").read_text(encoding="utf-8"))
    assert set(report) == set(ALGORITHMS)
    assert made.metrics["bytes_per_token"]["bpe"]["en"] == report["bpe"]["languages"]["en"]["bytes_per_token"]
    cache = tmp_path / "hub"
    snapshot = cache / ("models--" + KNOWN["qwen"][0].replace("/", "--")) / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes((folders["bpe"] / "tokenizer.json").read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert [name for name, _ in known()] == ["qwen"], "what the cache holds; nothing is downloaded"
    again = run(ReportTokenizers(tokenizers={"ours": "bpe"}, data=["a"], cached=True), {**refs, "a": data})
    rates = again.metrics["bytes_per_token"]
    assert set(rates) == {"qwen", "ours"} and rates["qwen"] == rates["ours"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"special_tokens": ["tool"]}, "a sign and no space"),
        ({"special_tokens": ["<>"]}, "a sign and no space"),
        ({"special_tokens": ["<|pad|>"]}, "must be new"),
        ({"special_tokens": ["<a>", "<a>"]}, "must be new"),
        ({"vocab_size": 262, "special_tokens": ["<a>", "<b>"]}, "too small"),
        ({"algorithm": "unigramm"}, "unigram"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    (tmp_path / "x.txt").write_text("text")
    block = {"use": "tokenizer.train", "data": str(tmp_path / "x.txt"), **keys}
    with pytest.raises(FledgeError, match=said):
        from_values({"name": "x", "stages": {"t": block}})


def test_documents_without_a_language_are_reported_as_undetermined() -> None:
    made = TRAINERS["bpe"]([Document("hello hello").text], 270)
    assert set(measured(made, {"": ["hello"]})["languages"]) == {"und"}
