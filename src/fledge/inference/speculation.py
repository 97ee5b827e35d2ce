"""Tokens are guessed and then checked together: one pass of the model may give an answer several tokens.

A proposer guesses the next tokens of an answer: what followed the last words when they were written before
(`PromptLookup`), what a grammar leaves no choice about, or what a smaller model writes (`drafting.DraftModel`). The
model reads them all at once and `accept` keeps what it would have written itself (Leviathan et al., 2023):

- A guess that comes without probabilities is kept when the model's own draw, made as always, is that token. The
  tokens are those that would have come without guessing, seeds and all.
- A guess drawn from probabilities q is kept with probability min(1, p/q), else the token is drawn from what p has
  more of, max(0, p - q). The answer's distribution is p; its draws are others than without guessing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fledge.inference.constraint import Guide
from fledge.inference.sampling import Floats, Sampling, choose, pick, probabilities

_MOST = 10
"""tokens guessed at once, at most"""
_LONGEST_REST = 32
"""steps without guesses after a row of bad ones, at most"""
_AGREED = 32
"""tokens of agreement that are enough"""


@dataclass
class Draft:
    """Guessed tokens, and for each the distribution (V,) that it was drawn from where there is one."""

    ids: list[int] = field(default_factory=list)
    drawn_from: list[Floats] = field(default_factory=list)


def accept(rows: Floats, draft: Draft, state: Sampling, take: Callable[[int, Floats], bool]) -> int:
    """Check a draft against the model's logits `rows` (1 + len(draft.ids), V), of which the last follows the draft.

    `take(token, row)` gets every new token in turn (it tells `state`, too) and says whether the answer goes on.
    Returns how many guesses were kept; one token more than that was taken, unless the answer ended before.
    """
    for place, guess in enumerate(draft.ids):
        drawn_from = draft.drawn_from[place] if draft.drawn_from else None
        token = choose(rows[place], state) if drawn_from is None else check(rows[place], guess, drawn_from, state)
        goes_on = take(token, rows[place])
        if token != guess:
            return place
        if not goes_on:
            return place + 1
    take(choose(rows[-1], state), rows[-1])
    return len(draft.ids)


def check(row: Floats, guess: int, drawn_from: Floats, state: Sampling) -> int:
    """The token that goes where `guess`, drawn from the distribution `drawn_from` (V,), would go (algorithm 1)."""
    wanted = probabilities(row, state)
    if state.generator.random() * drawn_from[guess] < wanted[guess]:
        return guess
    missing = np.maximum(wanted - drawn_from, 0)
    # Equal distributions that rounding told apart leave nothing: then any draw from p is right.
    return pick(None, missing if missing.any() else wanted, state.generator.random())


@dataclass
class Pace:
    """How many tokens to guess next, from how the last guesses went: a function of the answer alone, not of time."""

    length: int = 4
    rest: int = 0
    """steps without a guess still to go"""
    misses: int = 0
    """drafts in a row of which nothing was kept"""

    def wanted(self) -> int:
        """The tokens to guess in this step."""
        if self.rest:
            self.rest -= 1
            return 0
        return self.length

    def saw(self, proposed: int, kept: int) -> None:
        """A draft of `proposed` tokens was checked."""
        if kept == proposed:
            self.length, self.misses = min(max(self.length, 2 * proposed), _MOST), 0
        elif kept:
            self.length, self.misses = kept + 1, 0
        else:
            self.misses += 1
            self.length = max(1, self.length // 2)
            self.rest = min(2**self.misses - 1, _LONGEST_REST) if self.misses > 1 else 0


class PromptLookup:
    """Guesses that a text goes on as it went on before: after the longest end of it that it holds already, and of
    several such places the last. Prompts that are rewritten, quoted or summarised repeat themselves in any language.
    """

    def __init__(self, least: int = 2) -> None:
        """`least`: the tokens that have to agree."""
        self.least = least
        self._ids = np.empty(256, np.int64)
        self._held = 0

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow `ids`; a text may grow from call to call, never change."""
        self._hold(ids)
        text, size = self._ids[: self._held], self._held
        ends = np.flatnonzero(text[:-1] == text[-1])  # where else the last token stands
        agreed = 1
        while agreed < _AGREED:
            longer = ends[ends >= agreed]
            longer = longer[text[longer - agreed] == text[size - 1 - agreed]]
            if not len(longer):
                break
            ends, agreed = longer, agreed + 1
        if agreed < self.least or not len(ends):
            return []
        start = int(ends[-1]) + 1
        period = size - start  # where the place is so near that the text ends, it goes round
        return [int(text[start + n % period]) for n in range(count)]

    def _hold(self, ids: Sequence[int]) -> None:
        if len(ids) > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(len(ids), np.int64)])
        self._ids[self._held : len(ids)] = ids[self._held :]
        self._held = len(ids)


class Guesser:
    """Guesses the tokens of one answer without a model: what its grammar forces, else what stood there before."""

    def __init__(self) -> None:
        self._lookup = PromptLookup()
        self._pace, self.draft_pace = Pace(), Pace()
        self.last = Draft()

    def guess(self, ids: Sequence[int], most: int, guide: Guide | None, lookup: bool = True) -> Draft:
        """A draft of at most `most` tokens that may follow `ids`; often none. Without `lookup` only what is forced."""
        self.last = Draft()
        if most > 0 and (wanted := min(most, self._pace.wanted())):
            found = guide.forced()[:wanted] if guide is not None else []
            if not found and lookup:
                found = self._lookup.propose(ids, wanted)
                found = found if guide is None else found[: guide.valid(found)]
            self.last = Draft(found)
        return self.last

    def saw(self, draft: Draft, kept: int) -> None:
        """A draft was checked: the last one made here, or a draft model's."""
        if draft.ids:
            (self._pace if draft is self.last else self.draft_pace).saw(len(draft.ids), kept)
