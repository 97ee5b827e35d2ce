"""Beam search, as `transformers` defines it: its scores, its stopping rule (`early_stopping=False`), its order.

A step sees one row of logits for each beam. The likeliest continuations of all beams together are looked at, the
score of a text being the sum of its tokens' log-probabilities in fp32. Those that end are put aside with their score
divided by length ** length_penalty, if they are among the best `beams` of the step; the best that go on are the next
beams. The search ends when as many texts as there are beams are finished and the best beam, at its present length,
could not beat the worst of them, or when the texts are as long as they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fledge.inference.engine import FinishReason, TokenLogprob
from fledge.inference.sampling import Floats, Sampling, adjusted, likeliest, log_sum, logprob_of

Ends = Callable[[list[int]], bool]
"""whether a text ends with the last of its new tokens"""


@dataclass
class Beam:
    """A text that may go on: its new tokens and the sum of their log-probabilities."""

    tokens: list[int]
    score: float
    sampling: Sampling
    """penalties and constraint; its generator is not used"""
    parent: int = 0
    """which of the last step's beams it goes on from"""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """of its tokens, where they are asked for"""


@dataclass
class Finished:
    """A text that has ended; `score` is divided by its length."""

    tokens: list[int]
    score: float
    reason: FinishReason
    logprobs: list[TokenLogprob] = field(default_factory=list)


class BeamSearch:
    """The beams of one request. `beams` has one entry before the first step, then at most `width`."""

    def __init__(self, sampling: Sampling, ends: Ends, stops: int, limit: int) -> None:
        """`stops`: how many tokens can end a text; `limit`: the most new tokens."""
        self.width, self.penalty = sampling.request.beams, sampling.request.length_penalty
        self.beams = [Beam([], 0.0, sampling)]
        self.finished: list[Finished] = []
        self.done = False
        self._ends, self._limit = ends, limit
        # Enough that `width` texts go on even if every beam could end with each of the tokens that end one.
        self._looked_at = max(2, 1 + stops) * self.width

    def step(self, logits: Sequence[Floats]) -> None:
        """Go one token further with a row of logits (V,) for each of `beams`."""
        running: list[Beam] = []
        ended: list[Finished] = []
        for place, (parent, token, score) in enumerate(self._continuations(logits)):
            if place >= self.width and len(running) == self.width:
                break
            beam = self._extended(parent, token, score, logits[parent])
            reason = self._reason(beam)
            if reason is None and len(running) < self.width:
                running.append(beam)
            elif reason is not None and place < self.width:
                ended.append(Finished(beam.tokens, self._normalised(beam), reason, beam.logprobs))
        # Equal scores: what was there first stays first.
        self.finished = sorted([*self.finished, *ended], key=lambda text: -text.score)[: self.width]
        full = len(self.finished) == self.width
        self.done = not running or (full and self._normalised(running[0]) <= self.finished[-1].score)
        if not self.done:
            self.beams = running

    def _extended(self, parent: int, token: int, score: float, row: Floats) -> Beam:
        source = self.beams[parent]
        beam = Beam([*source.tokens, token], score, source.sampling.fork(), parent)
        beam.sampling.took(token)
        if (count := beam.sampling.request.logprobs) is not None:
            beam.logprobs = [*source.logprobs, logprob_of(row, token, count)]
        return beam

    def _reason(self, beam: Beam) -> FinishReason | None:
        guide = beam.sampling.guide
        if self._ends(beam.tokens) or (guide is not None and guide.complete):
            return "stop"
        return "length" if len(beam.tokens) >= self._limit else None

    def _continuations(self, logits: Sequence[Floats]) -> list[tuple[int, int, float]]:
        """The likeliest (beam, token, score), best first; equal scores in the order of beams and vocabulary."""
        rows = []
        for beam, row in zip(self.beams, logits, strict=True):
            # Penalties and constraints work on log-probabilities here, bias and all.
            rows.append(adjusted(row - log_sum(row), beam.sampling) + np.float32(beam.score))
        scores = np.concatenate(rows)
        ids = likeliest(scores, min(self._looked_at, len(scores)))
        ids = ids[np.argsort(-scores[ids], kind="stable")][: self._looked_at]
        vocabulary = len(rows[0])
        return [(int(i) // vocabulary, int(i) % vocabulary, float(scores[i])) for i in ids if np.isfinite(scores[i])]

    def _normalised(self, beam: Beam) -> float:
        return float(np.float32(beam.score) / np.float32(len(beam.tokens) ** self.penalty))

    def results(self) -> list[Finished]:
        """The `n` best texts, best first. Where a constraint has fewer words than that, the last one repeats."""
        wanted = self.beams[0].sampling.request.n
        return (self.finished + self.finished[-1:] * wanted)[:wanted]
