"""How much of each source goes into a mixture, and which of its texts: arithmetic on sizes, nothing is read here.

Shares follow weights raised to 1/T (a temperature T above 1 lifts the small sources; Devlin, 2018; Conneau et al.,
2020); a source without a weight weighs what it holds. Repeats are counted: up to about four passes over the same text
are worth nearly as much as new text, more are worth ever less (Muennighoff et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.units import show_count
from fledge.data.ngrams import Words64, mix

MANY_EPOCHS = 4.0  # Muennighoff et al., 2023: beyond, repeating pays less and less
_STEP = np.uint64(0x9E3779B97F4A7C15)

PRESETS: Mapping[str, Mapping[str, float]] = {
    "gpt3": {"web": 0.82, "books": 0.16, "reference": 0.03},
    "llama": {"web": 0.82, "code": 0.045, "reference": 0.045, "books": 0.045, "papers": 0.025, "forums": 0.02},
    "balanced": {
        "web": 0.45, "books": 0.12, "papers": 0.10, "news": 0.08, "reference": 0.10, "code": 0.12, "forums": 0.03,
    },
}  # fmt: skip
"""Weights by genre. gpt3: Brown et al. (2020), table 2.2; llama: Touvron et al. (2023), table 1 (encyclopaedias are
`reference`, Stack Exchange is `forums`); balanced: ours, for corpora in which the web would drown all else."""


@dataclass(frozen=True)
class Wish:
    """What a recipe asks of one source that holds `size` (bytes or tokens)."""

    size: int
    weight: float | None = None
    epochs: float | None = None


def weights_by_genre(preset: str, genres: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, float]:
    """The weight of each source (name → genre): sources of one genre share its weight by their sizes."""
    weights, held = PRESETS[preset], dict[str, int]()
    for name, genre in genres.items():
        held[genre] = held.get(genre, 0) + sizes[name]
    return {name: weights[genre] * sizes[name] / max(1, held[genre]) for name, genre in genres.items()}


def amounts(
    wishes: Mapping[str, Wish], budget: int | None, temperature: float = 1.0, most_epochs: float | None = None
) -> dict[str, int]:
    """How much of each source is taken, in the unit of the sizes; the sum is the budget exactly.

    Sources with `epochs` take so many passes, the others divide what is left by their weights. None of the latter is
    read more than `most_epochs` times: what it cannot give goes to the others (UniMax, Chung et al., 2023), and where
    none can, the mixture stays below its budget. Without a budget the mixture is as large as it can be without
    reading a weighted source twice (or `most_epochs` times). Raises FledgeError where the budget is too small.
    """
    taken = {name: round(w.epochs * w.size) for name, w in wishes.items() if w.epochs is not None}
    names = [name for name, w in wishes.items() if w.epochs is None and w.size]
    shares = {name: _share(wishes[name], temperature) for name in names}
    if budget is None:
        passes, all_shares = most_epochs or 1.0, sum(shares.values())
        left = int(min((passes * wishes[n].size * all_shares / shares[n] for n in names), default=0))
    else:
        left = budget - sum(taken.values())
    if left < 0 or (names and budget is not None and not left):
        raise FledgeError(
            Problem(
                t("the epochs asked for leave no room in the mixture's budget"),
                found=show_count(sum(taken.values())),
                allowed=show_count(budget or 0),
            )
        )
    if not names and left:
        raise FledgeError(Problem(t("no source with a weight is there to fill the mixture's budget")))
    limits = {name: int(most_epochs * wishes[name].size) if most_epochs else left for name in names}
    return {name: {**taken, **_poured(left, shares, limits)}.get(name, 0) for name in wishes}


def _share(wish: Wish, temperature: float) -> float:
    weight = wish.size if wish.weight is None else wish.weight
    return float(weight ** (1 / temperature))


def _poured(left: int, shares: Mapping[str, float], limits: Mapping[str, int]) -> dict[str, int]:
    """`left` divided by the shares, none above its limit, to the last unit."""
    poured = dict.fromkeys(shares, 0)
    open_ = list(shares)
    while open_:
        total = sum(shares[name] for name in open_)
        full = [name for name in open_ if left * shares[name] / total > limits[name]]
        if not full:
            break
        for name in full:
            poured[name] = limits[name]
            left -= limits[name]
            open_.remove(name)
    if open_:
        total = sum(shares[name] for name in open_)
        exact = {name: left * shares[name] / total for name in open_}
        poured |= {name: int(value) for name, value in exact.items()}
        rest = left - sum(int(value) for value in exact.values())
        for name in sorted(open_, key=lambda name: (int(exact[name]) - exact[name], name))[:rest]:
            poured[name] += 1
    return poured


@dataclass(frozen=True)
class Chosen:
    """Texts of one source in the mixture; a text that is taken twice stands here twice."""

    rows: NDArray[np.int64]
    epochs: NDArray[np.int64]  # from 0
    times: NDArray[np.float64]  # when in the mixture it comes, 0 to 1


def choose(sizes: NDArray[np.int64], hashes: Words64, amount: int, seed: int) -> Chosen:
    """Texts of together at most `amount`: whole passes, then those whose hash comes first in another pass.

    No text left out of the last pass would still fit. A larger amount chooses the same texts and more (but for the
    last few), and a text is chosen by its hash, whatever else the source holds. Each pass is spread evenly over its
    part of the mixture. Texts of size 0 are never taken.
    """
    there = np.flatnonzero(sizes > 0)
    total = int(sizes[there].sum())
    passes, rest = divmod(amount, total) if total else (0, 0)
    rows, epochs, times = [], [], []
    for epoch in range(passes + 1):
        chances = _chances(hashes[there], seed, epoch)
        mine = np.arange(len(there)) if epoch < passes else _prefix(sizes[there], chances, rest)
        rows.append(there[mine])
        epochs.append(np.full(len(mine), epoch, dtype=np.int64))
        times.append((epoch + chances[mine] / 2.0**64) * (total / max(amount, 1)))
    last = np.nextafter(1.0, 0.0)
    return Chosen(np.concatenate(rows), np.concatenate(epochs), np.minimum(np.concatenate(times), last))


def _chances(hashes: Words64, seed: int, epoch: int) -> Words64:
    key = mix(np.array([(seed + epoch) & (2**64 - 1)], dtype=np.uint64) * _STEP + _STEP)
    return mix(hashes ^ key)


def _prefix(sizes: NDArray[np.int64], chances: Words64, limit: int) -> NDArray[np.int64]:
    """The first texts by chance that fit into `limit` together, then any later ones that still do."""
    others, left, taken = np.argsort(chances, kind="stable"), limit, [np.zeros(0, dtype=np.int64)]
    while len(others):
        count = int(np.searchsorted(np.cumsum(sizes[others]), left, side="right"))
        taken.append(others[:count])
        left -= int(sizes[taken[-1]].sum())
        others = others[count:]
        others = others[sizes[others] <= left]
    return np.concatenate(taken)


def in_order(times: Sequence[NDArray[np.float64]]) -> NDArray[np.int64]:
    """The order in which the texts of all sources come, as places in the sources' arrays one behind the other."""
    return np.argsort(np.concatenate(times), kind="stable") if times else np.zeros(0, dtype=np.int64)
