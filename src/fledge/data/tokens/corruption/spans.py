"""Span corruption (Raffel et al., 2020, section 3.1.4): runs of tokens become sentinels, and are what is predicted.

    row      Thank you for inviting me to your party last week .
    input    Thank you <extra_id_0> me to your party <extra_id_1> week . </s>
    target   <extra_id_0> for inviting <extra_id_1> last </s>

A share `rate` of a row's tokens lies in spans of `mean` tokens on average. Numbers of tokens and spans depend on the
length of the row alone, so that all inputs have one length and all targets another: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fledge.data.tokens.batches import Batch, Ids
from fledge.data.tokens.corruption.chance import Uniforms, chosen, documents_of, uniforms

NOISE, REST = range(2)


@dataclass(frozen=True)
class Lengths:
    """What corruption makes of a row of `row` tokens: `noise` of them in `spans` spans."""

    row: int
    noise: int
    spans: int

    @property
    def inputs(self) -> int:
        """Tokens the encoder reads: what is left, a sentinel for each span, the end."""
        return self.row - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """Tokens the decoder predicts: the spans, each behind its sentinel, and the end."""
        return self.noise + self.spans + 1


def lengths(row: int, rate: float = 0.15, mean: float = 3.0) -> Lengths:
    """Counts for rows of `row` ≥ 2 tokens: at least one token is noise and one is not, as in the paper's code."""
    noise = min(max(round(row * rate), 1), row - 1)
    spans = min(max(round(noise / mean), 1), noise, row - noise)
    return Lengths(row, noise, spans)


def row_length(inputs: int, rate: float = 0.15, mean: float = 3.0) -> int:
    """The longest row whose corrupted input has at most `inputs` ≥ 4 tokens: 568 for 512 (targets of 114)."""
    row = 2
    while lengths(row + 1, rate, mean).inputs <= inputs:
        row += 1
    return row


def segments(items: int, parts: int, keys: Uniforms) -> Ids:
    """(B, parts) lengths ≥ 1 that add up to `items`, every way of cutting as likely; keys (B, items - 1)."""
    cuts = chosen(items - 1, parts - 1, keys)
    places = np.nonzero(cuts)[1].reshape(len(keys), parts - 1) + 1
    ends = np.concatenate([np.zeros((len(keys), 1), np.int64), places, np.full((len(keys), 1), items)], axis=1)
    return np.diff(ends, axis=1)


def noise_mask(rows: int, counts: Lengths, seed: int, step: int) -> NDArray[np.bool_]:
    """(rows, counts.row) true on noise: spans of noise and of the rest by turns, beginning with the rest."""
    rest = counts.row - counts.noise
    noise = segments(counts.noise, counts.spans, uniforms((rows, counts.noise - 1), seed, step, NOISE))
    others = segments(rest, counts.spans, uniforms((rows, rest - 1), seed, step, REST))
    turns = np.stack([others, noise], axis=2).reshape(-1)  # rest, noise, rest, noise … of all rows
    return np.repeat(np.tile([False, True], rows * counts.spans), turns).reshape(rows, counts.row)


@dataclass(frozen=True)
class SpanCorruption:
    """How rows are corrupted: sentinels in their order, `end` behind inputs and targets, `start` before the targets."""

    sentinels: Sequence[int]
    end: int
    start: int
    seed: int
    rate: float = 0.15
    mean: float = 3.0

    def __call__(self, batch: Batch, step: int) -> Mapping[str, Ids]:
        """`input_ids`, `decoder_input_ids`, `labels` (what the decoder predicts at each of its places).

        `documents` and `decoder_documents` say which document of the row a token belongs to; a span that reaches
        into the next document belongs to the one in which it begins.
        """
        ids, documents = batch.input_ids, documents_of(batch.position_ids)
        rows, length = ids.shape
        counts = lengths(length, self.rate, self.mean)
        noise = noise_mask(rows, counts, self.seed, step)
        sentinels = np.asarray(self.sentinels[: counts.spans], dtype=np.int64)
        inputs = _with_sentinels(ids, noise, sentinels, counts.inputs - 1)
        targets = _with_sentinels(ids, ~noise, sentinels, counts.targets - 1)
        begins = _begins(noise)
        owners = documents[begins].reshape(rows, counts.spans)  # of each span
        kept = documents[~noise | begins].reshape(rows, -1)
        number = _begins(~noise).cumsum(axis=1) - 1
        told = np.take_along_axis(owners, number, axis=1)[noise | _begins(~noise)].reshape(rows, -1)
        labels = _ended(targets, self.end)
        return {
            "input_ids": _ended(inputs, self.end),
            "decoder_input_ids": np.concatenate([np.full((rows, 1), self.start), labels[:, :-1]], axis=1),
            "labels": labels,
            "documents": np.concatenate([kept, kept[:, -1:]], axis=1),
            "decoder_documents": np.concatenate([told, told[:, -1:]], axis=1),
        }


def restore(inputs: Sequence[int], targets: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The row that was corrupted, from one input and one target, their ends left out: the inverse of corruption."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [token for piece in inputs for token in spans.get(piece, [piece])]


def _begins(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where a run of true places begins."""
    return mask & ~np.pad(mask[:, :-1], ((0, 0), (1, 0)))


def _with_sentinels(ids: Ids, hidden: NDArray[np.bool_], sentinels: Ids, length: int) -> Ids:
    """Every run of hidden tokens as one sentinel: (B, length)."""
    begins = _begins(hidden)
    number = np.clip(begins.cumsum(axis=1) - 1, 0, None)
    return np.where(begins, sentinels[number], ids)[~hidden | begins].reshape(len(ids), length)


def _ended(ids: Ids, end: int) -> Ids:
    return np.concatenate([ids, np.full((len(ids), 1), end)], axis=1)
