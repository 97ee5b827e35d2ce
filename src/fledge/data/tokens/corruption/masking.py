"""Masks for masked language modelling (Devlin et al., 2019), drawn anew at every step (Liu et al., 2019).

Each token (or each whole word: Cui et al., 2021, for Chinese) is selected with probability `rate`. Of the selected
tokens most become the mask, a share `keep` stays as it is and a share `random` becomes any ordinary token: all of
them are predicted, the kept and the random ones too. Special tokens and padding are never selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fledge.data.tokens.batches import IGNORED, Batch, Ids
from fledge.data.tokens.corruption.chance import uniforms
from fledge.data.tokens.corruption.surfaces import Surfaces

SELECT, DECIDE, REPLACE, SAMPLE = range(4)  # what the uniforms are for


@dataclass(frozen=True)
class Masking:
    """How rows are masked. `surfaces` knows the words where whole words are masked, else it is None."""

    mask: int
    special: NDArray[np.bool_]  # (V,)
    seed: int
    rate: float = 0.15
    keep: float = 0.1
    random: float = 0.1
    surfaces: Surfaces | None = None

    def __call__(self, batch: Batch, step: int) -> Mapping[str, Ids]:
        """The batch masked for `step`: `input_ids`, `labels` (−100 where nothing was selected), and its other arrays.

        `uniforms` (B, T), one number a token, is what replaced-token detection samples with.
        """
        ids, maskable = batch.input_ids, self.maskable(batch)
        words = self.words(batch)
        keys = uniforms(ids.shape, self.seed, step, SELECT)  # one a word: words are numbered below T
        selected = maskable & (np.take_along_axis(keys, words, axis=1) < self.rate)
        fate = uniforms(ids.shape, self.seed, step, DECIDE)
        ordinary = np.flatnonzero(~self.special)
        other = ordinary[(uniforms(ids.shape, self.seed, step, REPLACE) * len(ordinary)).astype(np.int64)]
        masked = selected & (fate < 1 - self.keep - self.random)
        replaced = selected & ~masked & (fate < 1 - self.keep)
        corrupted = np.where(masked, self.mask, np.where(replaced, other, ids))
        labels = np.where(selected, ids, IGNORED)
        sampling = uniforms(ids.shape, self.seed, step, SAMPLE).astype(np.float32)
        return {**layout_of(batch), "input_ids": corrupted, "labels": labels, "uniforms": sampling}

    def maskable(self, batch: Batch) -> NDArray[np.bool_]:
        """(B, T) the tokens that may be selected: neither special nor padding."""
        found = ~self.special[batch.input_ids]
        return found if batch.attention_mask is None else found & (batch.attention_mask > 0)

    def words(self, batch: Batch) -> Ids:
        """(B, T) the number of each token's word in its row, below T; every token is a word where words are not."""
        if self.surfaces is None:
            return np.broadcast_to(np.arange(batch.input_ids.shape[1]), batch.input_ids.shape)
        begins = self.surfaces.word_begins(batch.input_ids) | (batch.position_ids == 0)
        begins[:, 0] = True
        return np.asarray(begins.cumsum(axis=1)) - 1


@dataclass(frozen=True)
class EveryTokenOnce:
    """Masks for measuring: `folds` batches of every batch, and each maskable token is masked in exactly one of them.

    The mean −log p of all of them is a pseudo-log-likelihood (Salazar et al., 2020, who mask one token at a time).
    """

    masking: Masking
    folds: int

    def __call__(self, batch: Batch, step: int) -> Mapping[str, Ids]:
        """The batch with the tokens of fold `step` % `folds` masked."""
        ids, maskable = batch.input_ids, self.masking.maskable(batch)
        fold = (uniforms(ids.shape, self.masking.seed, step // self.folds, SELECT) * self.folds).astype(np.int64)
        selected = maskable & (fold == step % self.folds)
        labels = np.where(selected, ids, IGNORED)
        return {**layout_of(batch), "input_ids": np.where(selected, self.masking.mask, ids), "labels": labels}


def layout_of(batch: Batch) -> dict[str, Ids]:
    """Where the tokens of a batch stand: positions, and which of them are padding where rows are padded."""
    mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
    return {"position_ids": batch.position_ids, **mask}
