"""The n-gram model against a slow one written down from the paper, on corpora small enough for it."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fledge.core.artifact import NGram, Tokenizer, files_of
from fledge.core.errors import FledgeError
from fledge.core.reference import Ref
from fledge.data.judges.kneser_ney import FALLBACK, discounts_of
from fledge.data.judges.ngram_model import NGramModel, Stream
from fledge.data.judges.stages import TrainNGram
from fledge.data.ngrams import unit_hashes
from fledge.data.texts import units
from fledge.data.tokens.stages import TrainTokenizer
from fledge.records.kinds import Document
from tests.data.conftest import Runner, chinese, corpus, english, write

Gram = tuple[str, ...]


class Slow:
    """Interpolated modified Kneser–Ney (Chen and Goodman, 1999), as recursion over dictionaries of tuples."""

    def __init__(self, texts: list[list[str]], order: int, min_count: int = 1, prune_from: int = 0) -> None:
        self.order, self.prune_from = order, prune_from
        seen = Counter(word for text in texts for word in text)
        self.known = {word for word, n in seen.items() if n >= min_count}
        self.unknown_kinds = max(1, len(seen) - len(self.known))
        marked = [["<s>", *(self.map(word) for word in text), "</s>"] for text in texts]
        self.counts: list[Counter[Gram]] = [
            Counter(tuple(text[i : i + k]) for text in marked for i in range(len(text) - k + 1))
            for k in range(1, order + 1)
        ]
        self.voices = self.known | {"</s>", "<unk>"}
        self.a: list[dict[Gram, int]] = []
        for k in range(1, order + 1):
            if k == order:
                a = dict(self.counts[k - 1])
            else:
                after: dict[Gram, set[str]] = {}
                for gram in self.counts[k]:
                    after.setdefault(gram[1:], set()).add(gram[0])
                a = {g: n if g[0] == "<s>" else len(after[g]) for g, n in self.counts[k - 1].items()}
            if k == 1:
                a.pop(("<s>",))
            self.a.append(a)
        self.discounts = [discounts_of(np.array(list(a.values()))) for a in self.a]
        self.mass: dict[tuple[int, Gram], tuple[int, float]] = {}

    def map(self, word: str) -> str:
        return word if word in self.known else "<unk>"

    def discounted(self, k: int, gram: Gram) -> float:
        a = self.a[k - 1].get(gram, 0)
        if not a or (0 < self.prune_from <= k and self.counts[k - 1][gram] < 2):
            return 0.0
        return a - self.discounts[k - 1][min(a, 3) - 1]

    def p(self, word: str, context: Gram) -> float:
        context = context[max(0, len(context) - self.order + 1) :]
        k = len(context) + 1
        if (k, context) not in self.mass:
            family = [gram for gram in self.a[k - 1] if gram[:-1] == context]
            total = sum(self.a[k - 1][gram] for gram in family)
            self.mass[k, context] = total, sum(self.discounted(k, gram) for gram in family)
        total, used = self.mass[k, context]
        lower = self.p(word, context[1:]) if context else 1 / len(self.voices)
        if not total:
            return lower
        return (self.discounted(k, (*context, word)) + (total - used) * lower) / total

    def logp(self, text: list[str]) -> list[float]:
        """ln p of every word of the text and of its end."""
        marked: Gram = ("<s>", *map(self.map, text), "</s>")
        strange = [word not in self.known for word in text] + [False]
        return [
            math.log(self.p(marked[i], marked[:i]) / (self.unknown_kinds if odd else 1))
            for i, odd in enumerate(strange, start=1)
        ]


def made_up(seed: int, texts: int = 60) -> list[list[str]]:
    """Texts whose next word depends on the last two, so that all orders have something to say; some words are rare."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(14)]
    made = []
    for number in range(texts):
        text = [rng.choice(words), rng.choice(words)]
        for _ in range(rng.randint(0, 20)):
            odd = rng.random() < 0.25
            text.append(rng.choice(words) if odd else words[(int(text[-1][1:]) * 3 + int(text[-2][1:])) % len(words)])
        made.append(text if number % 9 else [*text, f"w9{number}"])
    return made


def trained(run: Runner, tmp_path: Path, texts: list[list[str]], **options: Any) -> NGramModel:
    data = write(tmp_path / "data", [Document(" ".join(text), str(i), "en") for i, text in enumerate(texts)])
    stage = TrainNGram(data=[Ref("data")], held_out=0, **options)
    return NGramModel.load(run(stage, {"data": data}).path)


@pytest.mark.parametrize(("order", "min_count", "prune_from"), [(3, 1, 0), (4, 2, 0), (5, 1, 3), (2, 3, 2), (1, 1, 0)])
def test_every_probability_is_the_one_of_the_paper(
    run: Runner, tmp_path: Path, order: int, min_count: int, prune_from: int
) -> None:
    texts = made_up(1)
    slow = Slow(texts, order, min_count, prune_from)
    model = trained(run, tmp_path, texts, order=order, min_count=min_count, prune_from=prune_from)
    assert model.notes.unknown_kinds == slow.unknown_kinds and model.notes.vocabulary == len(slow.known)
    np.testing.assert_allclose(model.notes.discounts, slow.discounts, rtol=1e-12)
    asked = [*texts[:20], *made_up(2, 20), ["w3", "never", "w4", "w4", "w4", "other"], []]
    expected = [p for text in asked for p in slow.logp(text)]
    stream = Stream.of([unit_hashes(text) for text in asked])
    found = model.logp(stream)
    np.testing.assert_allclose(found[stream.room > 0], expected, atol=2e-5)
    assert not found[stream.room == 0].any()
    perplexities = model.perplexities([" ".join(text) for text in asked])
    exact = [math.exp(-sum(slow.logp(text)) / (len(text) + 1)) for text in asked]
    np.testing.assert_allclose(perplexities, exact, rtol=1e-4)


@pytest.mark.parametrize("prune_from", [0, 2, 3])
def test_after_any_context_the_probabilities_sum_to_one(run: Runner, tmp_path: Path, prune_from: int) -> None:
    texts = made_up(3)
    model = trained(run, tmp_path, texts, order=4, min_count=2, prune_from=prune_from)
    words = sorted(model.vocabulary)
    rng = random.Random(0)
    for context in ([], ["w1"], texts[0][:3], ["w2", "nothing", "w2"], rng.choices(words, k=5), ["no", "no", "no"]):
        ends = Stream.of([unit_hashes([*context, word]) for word in [*words, "no such word"]])
        last = np.cumsum(ends.sizes) - 2
        p = np.exp(model.logp(ends)[last])
        p[-1] *= model.notes.unknown_kinds  # so many words share what <unk> has
        over = Stream.of([unit_hashes(context)])
        assert p.sum() + math.exp(model.logp(over)[-1]) == pytest.approx(1, abs=2e-5)


def test_discounts_are_the_formulas_and_fall_back_where_they_say_nothing() -> None:
    counts = [1] * 60 + [2] * 20 + [3] * 10 + [4] * 5
    y = 60 / (60 + 40)
    expected = (1 - 2 * y * 20 / 60, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10)
    assert discounts_of(np.array(counts)) == pytest.approx(expected)
    assert discounts_of(np.array([1, 1, 2, 3])) == FALLBACK  # no 4
    assert discounts_of(np.array([1] * 50 + [2] * 10 + [3] * 50 + [4] * 50)) == FALLBACK  # D₂ < 0


def test_text_of_the_kind_it_was_trained_on_surprises_it_least(run: Runner, tmp_path: Path) -> None:
    data = write(tmp_path / "data", corpus(0, 300))
    made = run(TrainNGram(data=[Ref("data")], order=3), {"data": data})
    model, rng = NGramModel.load(made.path), random.Random(9)
    for language, text in (("en", english(rng)), ("zh", chinese(rng))):
        words = units(text)
        foreign = " ".join(rng.choices(["zxcv", "qwrt", "plmk"], k=40))
        plain, noise = model.perplexities([text, foreign])
        assert plain < 60 < 150 < noise
        assert made.metrics["held_out_perplexity"][language] == pytest.approx(plain, rel=0.25)
        assert set(words) <= set(model.vocabulary)
    assert made.metrics["held_out_perplexity_quantiles"]["zh"]["p50"] < 60


def test_the_order_of_texts_changes_no_byte(run: Runner, tmp_path: Path) -> None:
    rows = corpus(1, 60)
    parts = {"a": write(tmp_path / "a", rows[:20]), "b": write(tmp_path / "b", rows[20:])}
    swapped = {"a": write(tmp_path / "c", rows[:19:-1]), "b": write(tmp_path / "d", rows[19::-1])}
    one, other = (
        run(TrainNGram(data=[Ref("a"), Ref("b")], order=3, sample=60_000, held_out=0.2), inputs)
        for inputs in (parts, swapped)
    )
    for name in files_of(one.path):
        if name.endswith(("npy", "json")):
            assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name
    assert one.metrics["trained_on_bytes"] < 90_000 and one.metrics == other.metrics
    assert NGramModel.load(one.path).vocabulary == NGramModel.load(other.path).vocabulary


@pytest.mark.parametrize("unit", ["bytes", "tokens"])
def test_units_may_be_bytes_or_tokens(run: Runner, tmp_path: Path, unit: str) -> None:
    rows = corpus(2, 80)
    inputs = {"data": write(tmp_path / "data", rows)}
    if unit == "tokens":
        stage = TrainTokenizer(data=[Ref("data")], vocab_size=400)
        inputs["tokenizer"] = Tokenizer(run(stage, inputs).path)
    options = {"tokenizer": Ref("tokenizer")} if unit == "tokens" else {}
    model = NGramModel.load(run(TrainNGram(data=[Ref("data")], order=4, unit=unit, **options), inputs).path)
    text = rows[0].text
    scrambled = "".join(random.Random(0).sample(text, len(text)))
    plain, mixed = model.perplexities([text, scrambled])
    assert 1 < plain < 12 and mixed > 3 * plain
    assert not model.vocabulary
    (sums,), (size,) = model.scores(model.segment([text]))
    assert unit == "tokens" or size == len(text.encode()) + 1
    assert math.exp(-sums / size) == pytest.approx(plain)


def test_a_long_list_of_texts_is_scored_in_parts(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(text) for text in made_up(5)]
    model = trained(run, tmp_path, made_up(4), order=3)
    whole = model.perplexities(texts)
    monkeypatch.setattr("fledge.data.judges.ngram_model._AT_ONCE", 30)
    np.testing.assert_allclose(model.perplexities(texts), whole, rtol=1e-12)
    assert model.perplexities([]).shape == (0,)


def test_what_is_no_model_is_refused(run: Runner, tmp_path: Path) -> None:
    with pytest.raises(FledgeError, match="is not an n-gram model"):
        NGramModel.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FledgeError, match="no text"):
        run(TrainNGram(data=[Ref("data")]), {"data": write(tmp_path / "none", [], "documents")})
    assert [problem.what for problem in TrainNGram(data=[Ref("data")], unit="tokens").check()]
    assert NGram.problem_with(tmp_path / "missing")
