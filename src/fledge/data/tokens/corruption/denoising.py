"""Corruptions of denoising pre-training (Lewis et al., 2020, section 2.2), of one document or many in a row.

| | |
|---|---|
| sentence permutation | the sentences of a document in another order |
| text infilling | spans of Poisson(λ) tokens each become one mask; a span of 0 tokens is a mask put in |
| token masking, token deletion | single tokens become the mask, or vanish |
| document rotation | the document begins with another of its tokens |

The decoder reads and predicts the document as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fledge.data.tokens.batches import IGNORED, Batch, Ids, permutation
from fledge.data.tokens.corruption.chance import Uniforms, chosen, documents_of, uniforms
from fledge.data.tokens.corruption.surfaces import Surfaces

ORDER, LENGTHS, PLACES, MASK, DELETE, ROTATE = range(6)
PADDING = 0  # the document of padding


@dataclass(frozen=True)
class Denoising:
    """How documents are corrupted. `infill` is the share of tokens in spans, `mean` the λ of their lengths."""

    mask: int
    pad: int
    special: NDArray[np.bool_]  # (V,)
    seed: int
    infill: float = 0.3
    mean: float = 3.0
    token_mask: float = 0.0
    token_delete: float = 0.0
    rotate: bool = False
    surfaces: Surfaces | None = None
    """knows the sentences where they are permuted"""

    def __call__(self, batch: Batch, step: int) -> Mapping[str, Ids]:
        """`input_ids`, padded; `decoder_input_ids`, the rows as they were; `labels`, the token behind each of those.

        `documents` and `decoder_documents` say which document of the row a token belongs to, 0 for padding.
        """
        ids, documents = batch.input_ids, documents_of(batch.position_ids)
        rows, length = ids.shape
        begins = self.surfaces.sentence_begins(ids) if self.surfaces else np.zeros(ids.shape, np.bool_)
        inputs, owners = np.full_like(ids, self.pad), np.full_like(ids, PADDING)
        for row in range(rows):
            at = 0
            borders = [*np.flatnonzero(batch.position_ids[row] == 0).tolist(), length]
            for number, (start, end) in enumerate(pairwise(borders), 1):
                seeds = (self.seed, step, row, number)
                piece = self.corrupted(ids[row, start:end], begins[row, start:end], *seeds)
                inputs[row, at : at + len(piece)], owners[row, at : at + len(piece)] = piece, number
                at += len(piece)
        following = np.pad(batch.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
        return {
            "input_ids": inputs, "decoder_input_ids": ids, "labels": following,
            "documents": owners, "decoder_documents": documents,
        }  # fmt: skip

    def corrupted(self, ids: Ids, begins: NDArray[np.bool_], *seeds: int) -> Ids:
        """One document corrupted; special tokens at its ends stay where they are. Never longer than it was."""
        ordinary = np.flatnonzero(~self.special[ids])
        if not len(ordinary):
            return ids
        low, high = int(ordinary[0]), int(ordinary[-1]) + 1
        text = ids[low:high]
        if self.surfaces:
            text = permuted(text, begins[low:high], *seeds, ORDER)
        if self.rotate:
            text = np.roll(text, -int(uniforms(1, *seeds, ROTATE)[0] * len(text)))
        text = text[uniforms(len(text), *seeds, DELETE) >= self.token_delete]
        text = np.where(uniforms(len(text), *seeds, MASK) < self.token_mask, self.mask, text)
        text = infilled(text, self.infill, self.mean, self.mask, *seeds)
        return np.concatenate([ids[:low], text, ids[high:]])


def permuted(ids: Ids, begins: NDArray[np.bool_], *seeds: int) -> Ids:
    """The sentences in another order."""
    starts = [0, *(np.flatnonzero(begins[1:]) + 1).tolist(), len(ids)]
    sentences = [ids[a:b] for a, b in pairwise(starts)]
    order = permutation(len(sentences), *seeds)
    return np.concatenate([sentences[number] for number in order])


def infilled(ids: Ids, rate: float, mean: float, mask: int, *seeds: int) -> Ids:
    """round(rate · n) tokens in spans of Poisson(mean) tokens, each span one mask; the last one is cut to fit.

    Spans lie anywhere between the tokens that stay, every arrangement as likely as any other.
    """
    hidden = min(round(rate * len(ids)), len(ids))
    if not hidden:
        return ids
    drawn = poisson(mean, uniforms(4 * hidden + 16, *seeds, LENGTHS))
    count = int(np.searchsorted(np.cumsum(drawn), hidden)) + 1
    sizes = drawn[:count].copy()
    sizes[-1] -= sizes.sum() - hidden
    empty = np.flatnonzero(sizes == 0)
    room = hidden - (len(sizes) - len(empty))  # masks that may be put in before the document grows
    sizes = np.delete(sizes, empty[room:])
    slots = len(ids) - hidden + len(sizes)
    is_span = chosen(slots, len(sizes), uniforms((1, slots), *seeds, PLACES))[0]
    taken = np.ones(slots, dtype=np.int64)
    taken[is_span] = sizes
    starts = np.cumsum(taken) - taken
    return np.where(is_span, mask, ids[np.minimum(starts, len(ids) - 1)])


def poisson(mean: float, keys: Uniforms) -> Ids:
    """Poisson numbers with this mean, by inverting the distribution."""
    most = math.ceil(mean + 12 * math.sqrt(mean) + 12)
    logs = np.arange(most) * math.log(mean) - mean - np.array([math.lgamma(k + 1) for k in range(most)])
    return np.searchsorted(np.cumsum(np.exp(logs)), keys, side="right").astype(np.int64)
