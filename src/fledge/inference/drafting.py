"""A smaller model of the same tokenizer that guesses what the larger one will write."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fledge.inference.forward import Forward
from fledge.inference.sampling import Floats, Sampling, choose, pick, probabilities
from fledge.inference.speculation import Draft
from fledge.inference.step import Part


@dataclass
class Want:
    """An answer that `count` tokens are to be guessed for."""

    key: Hashable
    ids: list[int]
    """its tokens so far, prompt and all"""
    count: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()


@dataclass
class _Reading:
    """What the draft model holds of an answer."""

    blocks: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    """the tokens in its cache"""
    known: int = 0
    """how many of them are the answer's own for sure; the others were guessed"""


class DraftModel:
    """Guesses for many answers at once; holds the keys and values of each in blocks of its own."""

    def __init__(self, forward: Forward, blocks: int, vocabulary: int) -> None:
        """`blocks`: the most it may use; `vocabulary`: the columns of the logits that its guesses are checked with."""
        self._forward, self._most, self._vocabulary = forward, blocks, vocabulary
        self._made = 0
        self._free: list[int] = []
        self._readings: dict[Hashable, _Reading] = {}

    def release(self, key: Hashable) -> None:
        """Forget an answer."""
        if (reading := self._readings.pop(key, None)) is not None:
            self._free += reversed(reading.blocks)

    def propose(self, wants: Sequence[Want]) -> list[Draft]:
        """A draft for each: empty where there is no room for it.

        Prompts are read whole, so that an answer's drafts depend on nothing but itself.
        """
        drafts = [Draft() for _ in wants]
        guessing = [n for n, want in enumerate(wants) if self._begin(want)]
        parts = [self._part(wants[n], wants[n].ids[len(self._readings[wants[n].key].ids) :]) for n in guessing]
        states = {n: wants[n].sampling.fork("draft") for n in guessing}
        while guessing:
            rows = self._forward.run(parts).cpu().numpy()
            pairs = list(zip(guessing, rows, strict=True))
            guessing = [n for n, row in pairs if self._guess(row, states[n], drafts[n], wants[n])]
            parts = [self._part(wants[n], drafts[n].ids[-1:]) for n in guessing]
        return drafts

    def _guess(self, row: Floats, state: Sampling, draft: Draft, want: Want) -> bool:
        """Add a token to a draft; whether another should follow."""
        if not np.isfinite(row.max()):
            return False
        if len(row) != self._vocabulary:  # embeddings may be padded differently
            row = np.pad(row, (0, max(0, self._vocabulary - len(row))), constant_values=-np.inf)[: self._vocabulary]
        if state.request.temperature == 0:
            token = choose(row, state)
        else:
            draft.drawn_from.append(probabilities(row, state))
            token = pick(None, draft.drawn_from[-1], state.generator.random())
        draft.ids.append(token)
        state.took(token)
        ended = token in want.stop_ids or (state.guide is not None and state.guide.complete)
        return len(draft.ids) < want.count and not ended

    def _begin(self, want: Want) -> bool:
        """Whether there is anything to guess, and blocks for it; what was guessed wrongly before is forgotten."""
        if want.count < 1:
            return False
        reading = self._readings.setdefault(want.key, _Reading())
        self._rewind(reading, want.ids)
        return self._reserve(reading, len(want.ids) + want.count)

    def _part(self, want: Want, ids: list[int]) -> Part:
        reading = self._readings[want.key]
        part = Part(ids, len(reading.ids), reading.blocks, 1)
        reading.ids += ids
        return part

    def _rewind(self, reading: _Reading, ids: list[int]) -> None:
        """Forget what was guessed wrongly, and the last token at least: it has to be read for its logits."""
        same, held = min(reading.known, len(ids) - 1), min(len(reading.ids), len(ids) - 1)
        while same < held and reading.ids[same] == ids[same]:
            same += 1
        del reading.ids[same:]
        reading.known = same

    def _reserve(self, reading: _Reading, tokens: int) -> bool:
        """Whether the answer's blocks hold that many tokens now."""
        more = -(-tokens // self._forward.block_tokens) - len(reading.blocks)
        if tokens > self._forward.context or more > len(self._free) + self._most - self._made:
            return False
        if more > len(self._free):
            made = min(self._most, self._made + max(more - len(self._free), self._made // 2, 16))
            self._forward.allocate(made)
            self._free += range(self._made, made)
            self._made = made
        reading.blocks += [self._free.pop() for _ in range(max(more, 0))]
        return True
