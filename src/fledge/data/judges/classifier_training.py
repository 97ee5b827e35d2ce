"""Training a classifier from records: which rows teach, which calibrate, which measure, and how good it is.

Rows are divided by a hash of their text (or of a key of `meta`, so that the versions of a law stay together): rows with
the same text never stand on two sides. The numbers are those of rows that neither taught nor calibrated, each in its
interval of 95 %.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError, Problem
from fledge.core.intervals import Interval, wilson
from fledge.core.language import t
from fledge.data.judges.classifier import Bags, Features, Floats, Settings, loss, softmax, train
from fledge.data.ngrams import hash64
from fledge.data.texts import text_of, units
from fledge.records.kinds import Labelled
from fledge.records.shards import kind_in, read

LEAST = 20  # rows of a label: below that nothing can be said of it
_DRAWS = 500  # of the bootstrap
_BINS = 10  # of the calibration error
PARTS = ("learn", "calibrate", "held_out")


@dataclass(frozen=True)
class Row:
    """A text to learn from: `place` decides which part it belongs to, `order` which rows a limit keeps."""

    text: str
    label: str
    place: int
    order: int


def rows_of(data: Artifact, by: str, seed: int, label: str = "") -> Iterator[Row]:
    """Every row with its own label (labelled records), or all with `label`."""
    kind = "labelled" if not label else kind_in(data)
    for record in read(data, kind):
        text = text_of(record)
        normal = " ".join(units(text)) or text
        group = normal if by == "text" else record.meta.get(by, normal)
        own = record.label if isinstance(record, Labelled) and not label else label
        if text.strip() and own:
            yield Row(text, own, hash64(f"{seed} {group}"), hash64(f"{seed} {own} {normal}"))


def choose(rows: Iterable[Row], limit: int, balance: bool) -> dict[str, list[Row]]:
    """Label → rows, at most `limit` of each (with `balance` as many as the rarest label has); equal texts count once.

    Raises FledgeError where there are fewer than two labels, or a label has too few rows.
    """
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        known = found[row.label].get(row.order)
        if known is None or row.text < known.text:
            found[row.label][row.order] = row
    few = {label: len(some) for label, some in found.items() if len(some) < LEAST}
    if len(found) < 2 or few:
        raise FledgeError(
            Problem(
                t("a classifier needs two labels or more, and {rows} different texts of each", rows=LEAST),
                found=", ".join(f"{label}: {len(some)}" for label, some in sorted(found.items())) or "—",
            )
        )
    most = min(limit, min(map(len, found.values()))) if balance else limit
    return {label: [some[order] for order in sorted(some)[:most]] for label, some in sorted(found.items())}


def divide(rows: Sequence[Row], held_out: float, calibrate: float) -> dict[str, list[int]]:
    """The positions of the rows of each part."""
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    for at, row in enumerate(rows):
        share = row.place / 2**64
        part = "held_out" if share < held_out else "calibrate" if share < held_out + calibrate else "learn"
        parts[part].append(at)
    return parts


def train_classifier(
    sources: Sequence[tuple[Artifact, str]],
    features: Features,
    settings: Settings,
    out: Path,
    *,
    by: str = "text",
    limit: int = 20_000,
    balance: bool = False,
    held_out: float = 0.1,
    calibrate: float = 0.1,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train on (records, label; "" for the rows' own), save below `out`, measure. Returns the metrics."""
    everything = (row for data, label in sources for row in rows_of(data, by, settings.seed, label))
    chosen = choose(everything, limit, balance)
    labels = list(chosen)
    rows = [row for some in chosen.values() for row in some]
    gold = np.array([labels.index(row.label) for row in rows], dtype=np.int64)
    parts = {part: np.array(at, dtype=np.int64) for part, at in divide(rows, held_out, calibrate).items()}
    for part, at in parts.items():
        if missing := set(labels) - {labels[i] for i in gold[at].tolist()}:
            raise FledgeError(
                Problem(
                    t('no row of "{label}" falls into the part {part}', label=sorted(missing)[0], part=part),
                    fix=t("more rows are needed, or another key in `by`"),
                )
            )
    work = len(rows) * (1 + settings.epochs)
    bags = Bags.of(features, [row.text for row in rows], (lambda n: tell(n, work)) if tell else None)
    learn, tune = ((bags.take(parts[part]), gold[parts[part]]) for part in ("learn", "calibrate"))
    further = (lambda done, total: tell(len(rows) + done, len(rows) + total)) if tell else None
    classifier = train(labels, features, learn, tune, settings, further)
    classifier.save(out)
    scores = bags.take(parts["held_out"]).scores(classifier.weight, classifier.bias)
    return {
        "rows_by_label": dict(Counter(row.label for row in rows)),
        **{f"{part}_rows": len(at) for part, at in parts.items()},
        "temperature": round(classifier.temperature, 4),
        **measure(scores, classifier.temperature, gold[parts["held_out"]], settings.seed),
    }


# --- how good it is ------------------------------------------------------------------------------------------------


def measure(scores: Floats, temperature: float, gold: NDArray[np.int64], seed: int) -> dict[str, float]:
    """Accuracy, macro-F1, AUC, log-loss and calibration error with the ends of their intervals (`_low`, `_high`)."""
    p, before = softmax(scores / temperature), softmax(scores)
    found: dict[str, Interval] = {"accuracy": wilson(int((p.argmax(axis=1) == gold).sum()), len(gold))}
    metrics: Mapping[str, Callable[[NDArray[np.int64]], float]] = {
        "macro_f1": lambda at: macro_f1(p[at].argmax(axis=1), gold[at], p.shape[1]),
        "auc": lambda at: macro_auc(p[at], gold[at]),
        "calibration_error": lambda at: calibration_error(p[at], gold[at]),
        "log_loss": lambda at: loss(scores[at] / temperature, gold[at]),
    }
    for name, metric in metrics.items():
        found[name] = _bootstrap(metric, len(gold), seed)
    numbers = {"calibration_error_before": calibration_error(before, gold)}
    for name, interval in found.items():
        numbers |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {name: round(number, 4) for name, number in sorted(numbers.items())}


def _bootstrap(metric: Callable[[NDArray[np.int64]], float], n: int, seed: int) -> Interval:
    """The metric on all rows, and between which values 95 % of its bootstrap replicates lie."""
    random = np.random.default_rng(seed)
    draws = [metric(random.integers(n, size=n)) for _ in range(_DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(metric(np.arange(n)), float(low), float(high), n)


def macro_f1(guess: NDArray[np.int64], gold: NDArray[np.int64], labels: int) -> float:
    """The mean over labels of 2 · right / (guessed + gold); a label that is in neither counts 0."""
    right = np.bincount(gold[guess == gold], minlength=labels)
    both = np.bincount(guess, minlength=labels) + np.bincount(gold, minlength=labels)
    return float(np.mean(2 * right / np.maximum(both, 1)))


def macro_auc(p: Floats, gold: NDArray[np.int64]) -> float:
    """The mean over labels of the chance that a row of the label gets more of it than another row; ties count half."""
    return float(np.mean([_auc(p[:, label], gold == label) for label in range(p.shape[1])]))


def _auc(score: Floats, positive: NDArray[np.bool_]) -> float:
    yes, no = np.sort(score[positive]), np.sort(score[~positive])
    if not len(yes) or not len(no):
        return 0.5
    beaten = np.searchsorted(no, yes, side="left") + np.searchsorted(no, yes, side="right")
    return float(beaten.mean() / 2 / len(no))


def calibration_error(p: Floats, gold: NDArray[np.int64]) -> float:
    """Expected calibration error: |confidence − accuracy| over ten bins of the likeliest label's probability."""
    sure, right = p.max(axis=1), p.argmax(axis=1) == gold
    bins = np.minimum((sure * _BINS).astype(np.int64), _BINS - 1)
    gap = np.bincount(bins, sure, _BINS) - np.bincount(bins, right, _BINS)
    return float(np.abs(gap).sum() / max(1, len(gold)))
