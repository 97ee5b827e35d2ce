"""From logits to tokens: penalties and bias, temperature, top-k, top-p, min-p, one draw.

Every answer has its own generator and takes exactly one uniform number per token, turned into a token by the inverse
of the cumulative distribution in the vocabulary's order: what else is in the batch cannot change the draw. Python's
generator is used because the language fixes its sequence. All of it is numpy on the host, in one thread: sorting
64 × 4,096 logits takes it 0.5 ms, where torch's `topk` takes 6 ms and waits for its threads besides.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fledge.inference.engine import Request, TokenLogprob

Floats: TypeAlias = NDArray[np.floating[Any]]


@dataclass
class Sampling:
    """The state of one answer's sampling: its settings, its generator, and the tokens seen so far."""

    request: Request
    generator: random.Random
    prompt: frozenset[int] = frozenset()
    """distinct tokens of the prompt, where a repetition penalty needs them"""
    counts: Counter[int] = field(default_factory=Counter)
    """how often the answer holds each token"""

    @classmethod
    def of(cls, request: Request, prompt_ids: Sequence[int], index: int) -> Sampling:
        """The state before the first token of answer `index` of a request."""
        if request.seed is None:
            generator = random.Random()
        else:  # mixed, so that (seed 1, answer 1) is not (seed 2, answer 0)
            digest = blake2b(f"{request.seed}/{index}".encode(), digest_size=16).digest()
            generator = random.Random(int.from_bytes(digest, "big"))
        prompt = frozenset(prompt_ids) if request.repetition_penalty != 1 else frozenset()
        return cls(request, generator, prompt)

    @property
    def penalised(self) -> bool:
        """Whether the logits have to be changed before anything else."""
        r = self.request
        return bool(r.repetition_penalty != 1 or r.presence_penalty or r.frequency_penalty or r.logit_bias)

    def took(self, token: int) -> None:
        """Remember a token that the answer gained."""
        self.counts[token] += 1


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
        if 0 <= token < len(logits):
            logits[token] += bias


def sample(logits: Floats, states: Sequence[Sampling]) -> list[int]:
    """The next token of every row of `logits` (B, V), fp32. Advances each state's generator, not its counts."""
    if any(state.penalised for state in states):
        logits = logits.copy()
        for row, state in zip(logits, states, strict=True):
            if state.penalised:
                penalise(row, state)
    tokens: list[int] = logits.argmax(-1).tolist()  # the first maximum wins
    for cut in (False, True):
        rows = [b for b, s in enumerate(states) if s.request.temperature > 0 and _is_cut(s.request) is cut]
        if rows:
            for row, token in zip(rows, _draw(logits[rows], [states[row] for row in rows], cut), strict=True):
                tokens[row] = token
    return tokens


def _is_cut(request: Request) -> bool:
    return request.top_k > 0 or request.top_p < 1 or request.min_p > 0


def _draw(logits: Floats, states: Sequence[Sampling], cut: bool) -> list[int]:
    """One token per row of `logits` (B, V); all temperatures are above 0."""
    # Less the maximum, a tiny temperature stays finite: the maximum becomes 0, all else goes towards -inf.
    heights = logits - logits.max(-1, keepdims=True)
    scale = 1 / np.array([max(state.request.temperature, 1e-6) for state in states])[:, None]
    mass = np.exp(heights * scale)  # (B, V) float64, the likeliest is 1
    if cut:
        mass[heights < _thresholds(heights, scale, [state.request for state in states])] = 0
    cumulative = mass.cumsum(-1)
    tokens = []
    for row, state in zip(cumulative, states, strict=True):
        token = int(row.searchsorted(state.generator.random() * row[-1], side="right"))
        # Rounding may carry the last draw past the end: then it is the last token that has any mass.
        tokens.append(min(token, int(row.searchsorted(row[-1]))))
    return tokens


def _thresholds(heights: Floats, scale: Floats, requests: Sequence[Request]) -> Floats:
    """The least height (B, 1) that top-k, then top-p of what is left, then min-p keep. Ties are kept together."""
    vocabulary = heights.shape[-1]
    ordered = np.sort(heights, -1)[:, ::-1]
    mass = np.exp(ordered * scale)
    upto = mass.cumsum(-1)
    least = np.empty((len(requests), 1), heights.dtype)
    for b, r in enumerate(requests):
        count = min(r.top_k or vocabulary, vocabulary)
        if r.top_p < 1:  # as many as it takes to reach top_p
            count = min(count, 1 + int(upto[b, :count].searchsorted(r.top_p * upto[b, count - 1])))
        if r.min_p > 0:
            count = min(count, int(np.count_nonzero(mass[b, :count] >= r.min_p)))
        least[b] = ordered[b, count - 1]
    return least


def logprobs_of(logits: Floats, tokens: Sequence[int], states: Sequence[Sampling]) -> list[TokenLogprob | None]:
    """Log-probabilities under the model itself, for the rows that ask for them. `logits` (B, V) in fp32."""
    found: list[TokenLogprob | None] = [None] * len(states)
    for b, (row, token, state) in enumerate(zip(logits, tokens, states, strict=True)):
        count = state.request.logprobs
        if count is not None:
            peak = row.max()
            logprobs = row - (peak + np.log(np.exp(row - peak, dtype=np.float64).sum())).astype(np.float32)
            best = np.argsort(-row, kind="stable")[:count]
            top = tuple((int(id), float(logprobs[id])) for id in best)
            found[b] = TokenLogprob(token, float(logprobs[token]), top)
    return found
