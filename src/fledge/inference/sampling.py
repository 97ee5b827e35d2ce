"""From logits to tokens. In this order:

1. repetition penalty, then presence and frequency penalties, then bias (`penalise`);
2. what a constraint forbids goes to -inf (`Guide.mask`);
3. temperature, top-k, top-p of what top-k left, min-p (`candidates`);
4. one draw (`pick`).

Every answer has its own generator and takes exactly one uniform number per token, turned into a token by the inverse
of the cumulative distribution in the vocabulary's order: what else is in the batch cannot change the draw. Python's
generator is used because the language fixes its sequence. All of it is numpy on the host, row by row, and each row
pays for what it asks: a greedy one for its argmax, top-k for a selection, top-p for one exponential of the row and a
sort of the few tokens that can be in the nucleus.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fledge.inference.engine import Request, TokenLogprob

if TYPE_CHECKING:
    from fledge.inference.constraint import Guide

Floats: TypeAlias = NDArray[np.floating[Any]]
Ids: TypeAlias = NDArray[np.int64]

_COARSE = 4096
"""masses above which a draw first chooses a block, then a token in it"""
_FAR = (2.0**-5, 2.0**-9, 2.0**-13)
"""fractions of the likeliest token's mass at which a nucleus is looked for"""


@dataclass
class Sampling:
    """The state of one answer's sampling: its settings, its generators, the tokens seen so far, its constraint."""

    request: Request
    generator: random.Random
    prompt: frozenset[int] = frozenset()
    """distinct tokens of the prompt, where a repetition penalty needs them"""
    counts: Counter[int] = field(default_factory=Counter)
    """how often the answer holds each token"""
    guide: Guide | None = None
    """which tokens its constraint allows next"""

    @classmethod
    def of(cls, request: Request, prompt_ids: Sequence[int], index: int, guide: Guide | None = None) -> Sampling:
        """The state before the first token of answer `index` of a request."""
        prompt = frozenset(prompt_ids) if request.repetition_penalty != 1 else frozenset()
        return cls(request, _generator(request.seed, f"{index}"), prompt, guide=guide)

    @property
    def penalised(self) -> bool:
        """Whether the logits have to be changed before anything else."""
        r = self.request
        return bool(r.repetition_penalty != 1 or r.presence_penalty or r.frequency_penalty or r.logit_bias)

    def took(self, token: int) -> None:
        """Remember a token that the answer gained."""
        self.counts[token] += 1
        if self.guide is not None:
            self.guide.took(token)

    def fork(self, stream: str = "") -> Sampling:
        """A state that goes on from here by itself: a beam, or (with a `stream` of its own) a draft."""
        generator = self.generator
        if stream:  # seeded from the answer's next numbers, which are not used up by looking
            twin = random.Random()
            twin.setstate(self.generator.getstate())
            generator = _generator(twin.getrandbits(64), stream)
        guide = self.guide.fork() if self.guide is not None else None
        return Sampling(self.request, generator, self.prompt, self.counts.copy(), guide)


def _generator(seed: int | None, stream: str) -> random.Random:
    if seed is None:
        return random.Random()
    # mixed, so that (seed 1, answer 1) is not (seed 2, answer 0)
    digest = blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


def penalise(logits: Floats, state: Sampling) -> None:
    """Change one row of logits (V,) in place by its penalties and bias."""
    r = state.request
    if r.repetition_penalty != 1:
        ids = list(state.prompt | state.counts.keys())
        seen = logits[ids]
        logits[ids] = np.where(seen > 0, seen / r.repetition_penalty, seen * r.repetition_penalty)
    if (r.presence_penalty or r.frequency_penalty) and state.counts:
        times = np.fromiter(state.counts.values(), np.float32)
        logits[list(state.counts)] -= r.presence_penalty + r.frequency_penalty * times
    for token, bias in r.logit_bias.items():
        logits[token] += bias


def adjusted(row: Floats, state: Sampling) -> Floats:
    """The row (V,) after penalties, bias and constraint; itself where there are none, else a copy."""
    if state.penalised or state.guide is not None:
        row = row.copy()
        penalise(row, state)
        if state.guide is not None:
            state.guide.mask(row)
    return row


def sample(logits: Floats, states: Sequence[Sampling]) -> list[int]:
    """The next token of every row of `logits` (B, V), fp32. Advances each state's generator, not its counts."""
    return [choose(row, state) for row, state in zip(logits, states, strict=True)]


def choose(row: Floats, state: Sampling) -> int:
    """The next token of one answer from its row of logits (V,)."""
    row = adjusted(row, state)
    if state.request.temperature == 0:
        return int(row.argmax())  # the first maximum wins
    return pick(*candidates(row, state.request), state.generator.random())


def probabilities(row: Floats, state: Sampling) -> Floats:
    """The distribution (V,), float64, from which `choose` draws; at temperature 0 all of it on one token."""
    row = adjusted(row, state)
    whole = np.zeros(len(row))
    if state.request.temperature == 0:
        whole[row.argmax()] = 1
        return whole
    ids, mass = candidates(row, state.request)
    whole[slice(None) if ids is None else ids] = mass
    whole /= whole.sum()
    return whole


def candidates(row: Floats, request: Request) -> tuple[Ids | None, Floats]:
    """The tokens that temperature, top-k, top-p and min-p leave, in the vocabulary's order (None: all), and their
    masses, of which the largest is 1. Tokens as likely as the last one kept are kept too."""
    ids = likeliest(row, request.top_k) if 0 < request.top_k < len(row) else None
    heights = row if ids is None else row[ids]
    # Less the maximum, a tiny temperature stays finite: the maximum becomes 0, all else goes towards -inf.
    mass = heights - heights.max()
    np.exp(np.multiply(mass, np.float32(1 / max(request.temperature, 1e-6)), out=mass), out=mass)
    least = request.min_p
    if request.top_p < 1:
        least = max(least, _nucleus(mass, request.top_p))
    if least > 0:
        kept = np.flatnonzero(mass >= least)
        ids, mass = kept if ids is None else ids[kept], mass[kept]
    return ids, mass


def _nucleus(mass: Floats, top_p: float) -> float:
    """The least mass of the smallest set of tokens that together reach `top_p` of all."""
    total = float(mass.sum(dtype=np.float64))
    # All tokens below the mean of what may be missing are, together, less than what may be missing. Mostly the few
    # that are not far below the likeliest suffice, and only those have to be sorted.
    least = (1 - top_p) * total / len(mass)
    for bound in (*(far for far in _FAR if far > least), least):
        likely = mass[mass > bound]
        if likely.sum(dtype=np.float64) >= top_p * total:
            break
    ordered = np.sort(likely)[::-1]
    if not len(ordered):
        return float(mass.max())
    reached = ordered.cumsum(dtype=np.float64)
    return float(ordered[min(int(reached.searchsorted(top_p * total)), len(ordered) - 1)])


def likeliest(row: Floats, count: int) -> Ids:
    """The ids of the `count` largest of a row (V,), in the row's order; what equals the last of them is there too."""
    lanes = max(4 * count, 1024)
    bound = None
    if len(row) >= 4 * lanes:
        # The largest of each lane: at least `count` numbers reach the count-th largest of those.
        tops = row[: len(row) // lanes * lanes].reshape(-1, lanes).max(0)
        bound = np.partition(tops, lanes - count)[lanes - count]
    ids = np.arange(len(row)) if bound is None else np.flatnonzero(row >= bound)
    values = row[ids]
    if len(ids) > count:
        ids = ids[values >= np.partition(values, len(ids) - count)[len(ids) - count]]
    return ids


def pick(ids: Ids | None, mass: Floats, uniform: float) -> int:
    """The token at `uniform` (0 … 1) of the cumulative masses."""
    first, rest = 0, uniform
    if len(mass) > _COARSE:
        blocks = np.add.reduceat(mass, np.arange(0, len(mass), 256), dtype=np.float64)
        block, rest = _search(blocks, uniform * float(blocks.sum()))
        first = block * 256
        mass = mass[first : first + 256]
    else:
        rest = uniform * float(mass.sum(dtype=np.float64))
    place = first + _search(mass, rest)[0]
    return int(place if ids is None else ids[place])


def _search(mass: Floats, target: float) -> tuple[int, float]:
    """The place where the running sum of `mass` passes `target`, and how far into that place the target is."""
    cumulative = mass.cumsum(dtype=np.float64)
    # Rounding may carry the target past the end: then it is the last place that has any mass.
    place = min(int(cumulative.searchsorted(target, side="right")), int(cumulative.searchsorted(cumulative[-1])))
    return place, target - (float(cumulative[place - 1]) if place else 0.0)


def logprobs_of(logits: Floats, tokens: Sequence[int], states: Sequence[Sampling]) -> list[TokenLogprob | None]:
    """Log-probabilities under the model itself, for the rows that ask for them. `logits` (B, V) in fp32."""
    found: list[TokenLogprob | None] = [None] * len(states)
    for b, (row, token, state) in enumerate(zip(logits, tokens, states, strict=True)):
        if state.request.logprobs is not None:
            found[b] = logprob_of(row, token, state.request.logprobs)
        elif ranked(state.request):
            found[b] = logprob_of(row, token, 0)
    return found


def ranked(request: Request) -> bool:
    """Whether more answers are sampled than are returned, so that their likelihoods are needed."""
    return (request.best_of or 0) > request.n


def logprob_of(row: Floats, token: int, count: int) -> TokenLogprob:
    """The log-probability of a token under a row of logits (V,), with the `count` likeliest."""
    scale = log_sum(row)
    top: list[tuple[int, float]] = []
    if count:
        ids = likeliest(row, min(count, len(row)))
        ids = ids[np.argsort(-row[ids], kind="stable")][:count]
        top = [(int(id), float(row[id] - scale)) for id in ids]
    return TokenLogprob(token, float(row[token] - scale), tuple(top))


def log_sum(row: Floats) -> np.float32:
    """log Σ exp of a row (V,), in fp32."""
    peak = row.max()
    return np.float32(peak + np.log(np.exp(row - peak).sum(dtype=np.float64)))
