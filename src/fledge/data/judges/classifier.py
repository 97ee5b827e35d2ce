"""A linear classifier of texts: quality, topic, toxicity.

The idea of fastText (Joulin et al., 2017): a text is the bag of its units' 1- and 2-grams and its characters' 3- to
5-grams, hashed into 2ᵇ buckets; the classes are scored by one matrix. Here without the layer between (multinomial
logistic regression), each text a vector of length 1 with log(1 + count) in its buckets, trained with AdaGrad (Duchi et
al., 2011) and calibrated by one temperature on rows that it was not trained on (Guo et al., 2017). Words or single
unspaced characters are the units, so Chinese works as English does.

    classifier = Classifier.load(path)
    classifier.predict(["a text", "一段文字"])      # [{"good": 0.91, "bad": 0.09}, …]

On disk: `weights.safetensors` (weight (2ᵇ, L), bias (L,), float32) and `labels.json`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fledge.core.artifact import write_atomic
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.ngrams import Words64, ngrams, unit_hashes
from fledge.data.texts import units

Floats: TypeAlias = NDArray[np.float64]
WEIGHTS, LABELS = "weights.safetensors", "labels.json"
_SPACE = re.compile(r"\s+")
_BATCH = 64  # texts a step of training
_AT_ONCE = 256  # texts whose features are in memory while predicting


@dataclass(frozen=True)
class Features:
    """How a text becomes numbers. Part of the model: the same at training and at use."""

    bits: int = 18  # 2^bits buckets
    unit_grams: int = 2  # up to so many units in a row
    characters: tuple[int, int] = (3, 5)  # from, to so many characters in a row
    longest: int = 4_000  # characters of a text that are looked at: its beginning

    def of(self, text: str) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """(buckets, values): the buckets that the text fills, ascending, and the values, of Euclidean length 1."""
        text = text[: self.longest]
        words = unit_hashes(units(text))
        letters = _letters(text)
        grams = [ngrams(words, n) for n in range(1, self.unit_grams + 1)]
        grams += [ngrams(letters, n) for n in range(self.characters[0], self.characters[1] + 1)]
        buckets = (np.concatenate(grams) >> np.uint64(64 - self.bits)).astype(np.uint32)
        filled, counts = np.unique(buckets, return_counts=True)
        values = np.log1p(counts)
        length = np.sqrt(values @ values)
        return filled, (values / length if length else values).astype(np.float32)


def _letters(text: str) -> Words64:
    """(n,) code points of the normalised text, one space at each end and for every run of white space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    padded = f" {_SPACE.sub(' ', plain).strip()} "
    return np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)


@dataclass(frozen=True)
class Bags:
    """The features of n texts, one after another: text i has `buckets[starts[i]:starts[i + 1]]`."""

    buckets: NDArray[np.uint32]
    values: NDArray[np.float32]
    starts: NDArray[np.int64]  # (n + 1,)

    @classmethod
    def of(cls, features: Features, texts: Sequence[str], tell: Callable[[int], None] | None = None) -> Bags:
        """The features of every text; `tell` hears how many are done."""
        bags = []
        for done, text in enumerate(texts, start=1):
            bags.append(features.of(text))
            if tell and done % 1_000 == 0:
                tell(done)
        sizes = np.array([0, *(len(buckets) for buckets, _ in bags)], dtype=np.int64)
        empty = (np.zeros(0, np.uint32), np.zeros(0, np.float32))
        buckets, values = (np.concatenate(parts) for parts in zip(*(bags or [empty]), strict=True))
        return cls(buckets, values, np.cumsum(sizes))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, rows: NDArray[np.int64]) -> Bags:
        """The bags of these texts."""
        sizes = self.starts[rows + 1] - self.starts[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        places = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], sizes)
        return Bags(self.buckets[places], self.values[places], starts)

    def rows(self) -> NDArray[np.int64]:
        """(len(buckets),) the text that every entry belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def scores(self, weight: NDArray[Any], bias: NDArray[Any]) -> Floats:
        """(n, L) bias + Σ value · weight[bucket]."""
        of = self.rows()
        columns = [
            np.bincount(of, self.values * weight[self.buckets, label].astype(np.float64), len(self))
            for label in range(weight.shape[1])
        ]
        return np.stack(columns, axis=1) + bias


class Classifier:
    """A trained classifier: `predict` gives a calibrated probability for every label."""

    def __init__(
        self,
        labels: Sequence[str],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
        features: Features,
        temperature: float = 1.0,
    ) -> None:
        self.labels, self.weight, self.bias = tuple(labels), weight, bias
        self.features, self.temperature = features, temperature

    def scores(self, texts: Sequence[str]) -> Floats:
        """(len(texts), labels) before temperature and softmax."""
        parts = [
            Bags.of(self.features, texts[first : first + _AT_ONCE]).scores(self.weight, self.bias)
            for first in range(0, len(texts), _AT_ONCE)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.labels)))

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """(len(texts), labels); every row sums to 1. A text is judged by itself, whatever stands beside it."""
        return softmax(self.scores(texts) / self.temperature)

    def predict(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Label → probability, for each text."""
        return [dict(zip(self.labels, row, strict=True)) for row in self.probabilities(texts).tolist()]

    def save(self, folder: Path) -> None:
        """Write `weights.safetensors` and `labels.json`."""
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(save({"bias": self.bias, "weight": self.weight}))
        says = {"labels": self.labels, "temperature": self.temperature, "features": asdict(self.features)}
        write_atomic(folder / LABELS, json.dumps(says, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """The classifier in a folder. Raises FledgeError where there is none, or one that is damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            says = json.loads((folder / LABELS).read_text(encoding="utf-8"))
            arrays = load((folder / WEIGHTS).read_bytes())
            features = Features(**{**says["features"], "characters": tuple(says["features"]["characters"])})
            labels, weight, bias = says["labels"], arrays["weight"], arrays["bias"]
            if weight.shape != (2**features.bits, len(labels)) or bias.shape != (len(labels),):
                raise ValueError(f"weight {weight.shape}, {len(labels)} labels")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FledgeError(
                Problem(t("is not a classifier"), where=str(folder), found=f"{type(error).__name__}: {error}"[:200])
            ) from None
        return cls(labels, weight, bias, features, float(says["temperature"]))


def softmax(scores: Floats) -> Floats:
    """Over the last axis."""
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def loss(scores: Floats, gold: NDArray[np.int64]) -> float:
    """Mean −ln p(gold): scores (n, L), gold (n,)."""
    top = scores.max(axis=1)
    normal = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
    return float((normal - scores[np.arange(len(gold)), gold]).mean())


@dataclass(frozen=True)
class Settings:
    """How a classifier is trained."""

    epochs: int = 8  # at most: the best by the loss on the calibration rows is kept
    lr: float = 0.5
    seed: int = 0


def train(
    labels: Sequence[str],
    features: Features,
    learn: tuple[Bags, NDArray[np.int64]],
    calibrate: tuple[Bags, NDArray[np.int64]],
    settings: Settings,
    tell: Callable[[int, int], None] | None = None,
) -> Classifier:
    """AdaGrad on the first rows, the epoch and the temperature chosen by the loss on the second.

    The same input gives the same bits: batches follow the seed, sums one order.
    """
    bags, gold = learn
    size = 2**features.bits
    weight, bias = np.zeros((size, len(labels))), np.zeros(len(labels))
    squares, bias_squares = np.full((size, len(labels)), 1e-8), np.full(len(labels), 1e-8)
    best = (np.inf, weight.astype(np.float32), bias.astype(np.float32))
    random = np.random.default_rng(settings.seed)
    worse = 0
    for epoch in range(settings.epochs):
        order = random.permutation(len(gold))
        for first in range(0, len(order), _BATCH):
            rows = order[first : first + _BATCH]
            batch = bags.take(rows)
            slope = softmax(batch.scores(weight, bias))
            slope[np.arange(len(rows)), gold[rows]] -= 1
            slope /= len(rows)  # (B, L) d loss / d scores
            of = batch.rows()
            for label in range(len(labels)):
                gradient = np.bincount(batch.buckets, batch.values * slope[of, label], size)
                squares[:, label] += gradient**2
                weight[:, label] -= settings.lr * gradient / np.sqrt(squares[:, label])
            gradient = slope.sum(axis=0)
            bias_squares += gradient**2
            bias -= 0.1 * settings.lr * gradient / np.sqrt(bias_squares)
            if tell:
                tell(epoch * len(order) + first + len(rows), settings.epochs * len(order))
        now = _calibrated(calibrate[0].scores(weight, bias), calibrate[1])[1]
        if now < best[0]:
            best, worse = (now, weight.astype(np.float32), bias.astype(np.float32)), 0
        elif (worse := worse + 1) == 2:
            break
    _, light, offset = best
    temperature, _ = _calibrated(calibrate[0].scores(light, offset), calibrate[1])
    return Classifier(labels, light, offset, features, temperature)


def _calibrated(scores: Floats, gold: NDArray[np.int64]) -> tuple[float, float]:
    """(the temperature in [0.05, 20] with the smallest loss, that loss): golden sections of its logarithm."""
    ratio = (np.sqrt(5) - 1) / 2
    low, high = np.log(0.05), np.log(20.0)
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(scores / np.exp(left), gold) <= loss(scores / np.exp(right), gold):
            high = right
        else:
            low = left
    temperature = float(np.exp((low + high) / 2))
    return temperature, loss(scores / temperature, gold)
