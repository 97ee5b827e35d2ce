"""Estimating an n-gram model: interpolated modified Kneser–Ney (Chen and Goodman, 1999, section 4.3) in sorted arrays.

With a the count of an n-gram (of the highest order, or of one that begins a text, how often it stands there; else in
how many different contexts to the left), D one of three discounts (for a = 1, 2, 3 and more) and c the context:

    p(w | c) = max(a(cw) − D(a), 0) / Σ a(c·) + γ(c) · p(w | c without its first unit),   p(w | nothing) ends in 1/V

    Y = n₁ / (n₁ + 2 n₂),   D₁ = 1 − 2Y n₂/n₁,   D₂ = 2 − 3Y n₃/n₂,   D₃ = 3 − 4Y n₄/n₃

where nᵢ is how many n-grams of that order have a = i. γ(c) is what the discounts, and the n-grams that are pruned,
leave of the mass: whatever is pruned, the probabilities of all units after any context sum to 1.

An n-gram is the hash of its units; nothing is kept of the text itself. 10 million units take about 2 GB and a minute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.judges.ngram_model import BEGIN, UNKNOWN, Floats, NGramModel, Notes, Order, Segmenter, Stream
from fledge.data.ngrams import Words64, hash64, mix
from fledge.data.texts import text_of, units
from fledge.records.shards import kind_in, read

Discounts: TypeAlias = tuple[float, float, float]
FALLBACK: Discounts = (0.5, 1.0, 1.5)  # where a corpus is too small or too odd for the formula
QUANTILES = (10, 25, 50, 75, 90, 95, 99)
_MEASURED = 2_000  # held-out texts of a language, at most


@dataclass
class _Grams:
    """The k-grams of one k while they are estimated; `context` and `suffix` are places among the (k−1)-grams."""

    keys: Words64
    counts: NDArray[np.int64]  # how often
    begins: NDArray[np.bool_]  # whether its first unit is <s>
    context: NDArray[np.int64]  # without the last unit
    suffix: NDArray[np.int64]  # without the first

    @classmethod
    def of(cls, stream: Stream, k: int, shorter: Words64) -> _Grams:
        grams, there = stream.grams(k)
        ends = np.flatnonzero(there)
        keys, first, counts = np.unique(grams[ends], return_index=True, return_counts=True)
        at = ends[first]  # where each stands first
        begins = stream.units[at - (k - 1)] == BEGIN
        if k == 1:
            nothing = np.zeros(len(keys), dtype=np.int64)
            return cls(keys, counts, begins, nothing, nothing)
        less = stream.grams(k - 1)[0]
        return cls(keys, counts, begins, np.searchsorted(shorter, less[at - 1]), np.searchsorted(shorter, less[at]))


def estimate(
    stream: Stream, order: int, prune_from: int = 0, tell: Callable[[int, int], None] | None = None
) -> tuple[list[Order], list[Discounts]]:
    """The arrays of every order, and its discounts. Every unit outside the vocabulary must be <unk> already.

    n-grams of `prune_from` units and more that occur once are dropped (0: none).
    """
    levels: list[_Grams] = []
    for k in range(1, order + 1):
        grams = _Grams.of(stream, k, levels[-1].keys if levels else np.zeros(0, np.uint64))
        levels.append(_with_unknown(grams) if k == 1 else grams)
        if tell:
            tell(k, 2 * order)
    orders: list[Order] = []
    discounts: list[Discounts] = []
    lower: Floats = np.zeros(0)
    kept_before = np.ones(1, dtype=bool)
    for k, grams in enumerate(levels, start=1):
        a = _adjusted(grams, k, levels[k] if k < order else None)
        discounts.append(discounts_of(a))
        kept = grams.counts >= 2 if 0 < prune_from <= k else np.ones(len(grams.keys), dtype=bool)
        d = np.array([0.0, *discounts[-1]])[np.minimum(a, 3)]
        contexts = len(levels[k - 2].keys) if k > 1 else 1
        total = np.bincount(grams.context, a, contexts)[grams.context]
        own = np.where(kept, (a - d) / np.maximum(total, 1), 0.0)  # p without what comes from below
        left = 1.0 - np.bincount(grams.context, own, contexts)  # γ
        if k == 1:
            voices = np.count_nonzero(~grams.begins)  # V: everything but <s>, which nothing predicts
            p = np.where(grams.begins, 0.0, own + left[0] / voices)
        else:
            orders[-1] = Order(orders[-1].keys, orders[-1].logp, _log(left[kept_before]))
            p = own + left[grams.context] * lower[grams.suffix]
        lower, kept_before = p, kept
        orders.append(Order(grams.keys[kept], _log(p[kept]), None))
        if tell:
            tell(order + k, 2 * order)
    return orders, discounts


def _with_unknown(grams: _Grams) -> _Grams:
    """The 1-grams and <unk>, which may stand nowhere in the text."""
    unknown = mix(np.array([UNKNOWN]))
    at = int(np.searchsorted(grams.keys, unknown)[0])
    if at < len(grams.keys) and grams.keys[at] == unknown[0]:
        return grams
    nothing = np.zeros(len(grams.keys) + 1, dtype=np.int64)
    keys, counts = np.insert(grams.keys, at, unknown), np.insert(grams.counts, at, 0)
    return _Grams(keys, counts, np.insert(grams.begins, at, False), nothing, nothing)


def _adjusted(grams: _Grams, k: int, longer: _Grams | None) -> NDArray[np.int64]:
    """a: how often; below the highest order, where no text begins so, after how many different units. Of <s>, 0."""
    if longer is None:
        a = grams.counts
    else:
        a = np.where(grams.begins, grams.counts, np.bincount(longer.suffix, minlength=len(grams.keys)))
    return np.where(grams.begins, 0, a) if k == 1 else a


def discounts_of(a: NDArray[np.int64]) -> Discounts:
    """D₁, D₂, D₃ of an order; the fall-back where the formula gives nothing in (0, i]."""
    n = [int(np.count_nonzero(a == i)) for i in range(1, 5)]
    if not all(n):
        return FALLBACK
    y = n[0] / (n[0] + 2 * n[1])
    found = tuple(i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3))
    return found if all(0 < d <= i for i, d in enumerate(found, start=1)) else FALLBACK  # type: ignore[return-value]


def _log(p: Floats) -> NDArray[np.float32]:
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(p, 0.0)).astype(np.float32)


# --- from records --------------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """The reference texts as units: those that are counted, and by language those that are only measured."""

    sequences: list[Words64]
    words: Counter[str]
    measured: dict[str, list[str]]
    bytes: int


def read_corpus(
    data: Sequence[Artifact], segment: Segmenter, sample: int, held_out: float, tell: Callable[[int], None]
) -> Corpus:
    """About `sample` bytes of the texts, from every input in proportion, of which a share is held out. A text is taken
    by its hash: the order of inputs and rows changes nothing."""
    total = sum(len(text.encode("utf-8", "surrogatepass")) for text, _ in _texts(data))
    share = min(1.0, sample / max(1, total))
    corpus, waiting = Corpus([], Counter(), {}, 0), list[str]()
    for text, language in _texts(data):
        place = hash64(text) / 2**64
        if place >= share:
            continue
        corpus.bytes += len(text.encode("utf-8", "surrogatepass"))
        if place < share * held_out:
            corpus.measured.setdefault(language, []).append(text)
            continue
        waiting.append(text)
        if len(waiting) == 1_000:
            _add(corpus, segment, waiting)
            waiting = []
            tell(corpus.bytes)
    _add(corpus, segment, waiting)
    return corpus


def _texts(data: Sequence[Artifact]) -> Iterable[tuple[str, str]]:
    for artifact in data:
        for record in read(artifact, kind_in(artifact)):
            if text := text_of(record):
                yield text, record.language


def _add(corpus: Corpus, segment: Segmenter, some: Sequence[str]) -> None:
    corpus.sequences += [sequence for sequence in segment(some) if len(sequence)]
    if segment.unit == "words":
        for text in some:
            corpus.words.update(units(text))


def fit(
    corpus: Corpus, segment: Segmenter, order: int, min_count: int, prune_from: int, tell: Callable[[int, int], None]
) -> tuple[NGramModel, dict[str, int]]:
    """The model of a corpus and the words that it knows. Raises FledgeError where there is nothing to count."""
    if not corpus.sequences:
        raise FledgeError(Problem(t("there is no text to count n-grams in")))
    kinds, counts = np.unique(np.concatenate(corpus.sequences), return_counts=True)
    known = kinds[counts >= min_count]
    sequences = [np.where(_among(sequence, known), sequence, UNKNOWN) for sequence in corpus.sequences]
    orders, discounts = estimate(Stream.of(sequences), order, prune_from, tell)
    notes = Notes(order, segment.unit, max(1, len(kinds) - len(known)), len(known), int(counts.sum()), tuple(discounts))
    return NGramModel(orders, notes, segment), {w: n for w, n in corpus.words.items() if n >= min_count}


def _among(values: Words64, known: Words64) -> NDArray[np.bool_]:
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    return np.asarray(known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values)


def train_ngram(
    data: Sequence[Artifact],
    segment: Segmenter,
    out: Path,
    *,
    order: int,
    min_count: int,
    prune_from: int,
    sample: int,
    held_out: float,
    tell: Callable[[float, float], None],
) -> dict[str, Any]:
    """Train, save below `out`, and measure the held-out texts. Returns the metrics."""
    corpus = read_corpus(data, segment, sample, held_out, lambda done: tell(done / 2, sample))
    model, words = fit(corpus, segment, order, min_count, prune_from, lambda done, of: tell(of + done, 2 * of))
    model.save(out, words)
    return {
        "trained_on_bytes": corpus.bytes,
        "units": model.notes.trained_units,
        "vocabulary": model.notes.vocabulary,
        "ngrams": {str(k): len(grams.keys) for k, grams in enumerate(model.orders, start=1)},
        **perplexity_of(model, corpus.measured),
    }


def perplexity_of(model: NGramModel, texts: dict[str, list[str]]) -> dict[str, Any]:
    """By language: the perplexity of all its texts together, and quantiles over texts to choose thresholds by."""
    whole, quantiles = {}, {}
    for language, everything in sorted(texts.items()):
        some = sorted(everything, key=hash64)[:_MEASURED]
        sums, sizes = model.scores(model.segment(some))
        whole[language or "und"] = round(float(np.exp(-sums.sum() / sizes.sum())), 2)
        at = np.percentile(np.exp(-sums / sizes), QUANTILES)
        quantiles[language or "und"] = {f"p{q}": round(float(v), 1) for q, v in zip(QUANTILES, at, strict=True)}
    return {"held_out_perplexity": whole, "held_out_perplexity_quantiles": quantiles}
