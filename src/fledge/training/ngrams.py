"""A byte n-gram model, the baseline that any neural model must beat: interpolated Witten–Bell smoothing.

    p_k(s | c) = ( n(cs) + T(c) · p_{k−1}(s | c′) ) / ( n(c) + T(c) )

n counts in the training text, T(c) is how many different bytes follow c there, c′ is c without its first byte, and
p₀ is uniform over 256 bytes (Witten & Bell, 1991; Chen & Goodman, 1999). It is a proper distribution: over s it sums
to 1 for every context.

Eight bytes fit a 64-bit integer, so the whole model is one sorted array of the text's 8-byte windows: the count of
any shorter gram is the length of a range in it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LONGEST = 8
Words = NDArray[np.uint64]


class ByteNgrams:
    """The model of `order` bytes (at most 8) trained on `text`."""

    def __init__(self, text: bytes, order: int = 6) -> None:
        if not 1 <= order <= LONGEST:
            raise ValueError(f"order must be between 1 and {LONGEST}, not {order}")
        self.order = order
        self.windows: Words = np.sort(_windows(text))  # (N,) each byte of the text and the seven after it

    def probabilities(self, contexts: NDArray[np.uint8], symbols: NDArray[np.uint8]) -> NDArray[np.float64]:
        """p(symbol | the bytes before it): contexts (M, order − 1), the nearest byte last; symbols (M,)."""
        p = np.full(len(symbols), 1 / 256)
        for length in range(self.order):  # bytes of context
            context = contexts[:, contexts.shape[1] - length :]
            low, high = self._range(context)
            n = (high - low).astype(np.float64)
            kinds = self._kinds(length, low, high)
            low, high = self._range(np.concatenate([context, symbols[:, None]], axis=1))
            seen = n > 0
            p[seen] = (((high - low) + kinds * p) / np.where(seen, n + kinds, 1.0))[seen]
        return p

    def bits_per_byte(self, data: bytes) -> float:
        """Mean −log₂ p of the bytes of `data`, each from those before it (zeros before the first)."""
        stream = np.frombuffer(b"\0" * (self.order - 1) + data, dtype=np.uint8)
        view = np.lib.stride_tricks.sliding_window_view(stream, self.order)
        return float(-np.log2(self.probabilities(view[:, :-1], view[:, -1])).mean())

    def _range(self, grams: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the windows that begin with each gram lie: grams (M, k) → first and past the last, (M,) each."""
        shift = np.uint64(8 * (LONGEST - grams.shape[1]))
        key = np.zeros(len(grams), dtype=np.uint64)
        for column in grams.T:
            key = (key << np.uint64(8)) | column.astype(np.uint64)
        if grams.shape[1] == 0:
            return np.zeros(len(grams), dtype=np.int64), np.full(len(grams), len(self.windows), dtype=np.int64)
        first = np.searchsorted(self.windows, key << shift, side="left")
        last = np.searchsorted(self.windows, (key << shift) | ((np.uint64(1) << shift) - np.uint64(1)), side="right")
        return first, last

    def _kinds(self, length: int, low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.float64]:
        """How many different bytes follow each context of `length` bytes, whose windows lie from `low` to `high`."""
        prefix = self.windows >> np.uint64(8 * (LONGEST - 1 - length))
        new = np.empty(len(prefix), dtype=np.int32)  # 1 where a gram of length + 1 appears first
        new[0], new[1:] = 1, prefix[1:] != prefix[:-1]
        before = np.concatenate([[0], np.cumsum(new)])
        return np.where(high > low, before[high] - before[low], 0).astype(np.float64)


def ngram_bits_per_byte(train_text: bytes, held_out: bytes, order: int = 6) -> float:
    """Bits a byte of `held_out` under a byte n-gram model trained on `train_text`."""
    return ByteNgrams(train_text, order).bits_per_byte(held_out)


def _windows(text: bytes) -> Words:
    """For each byte of the text, it and the seven after it as one big-endian integer (zeros past the end)."""
    stream = np.frombuffer(text + b"\0" * (LONGEST - 1), dtype=np.uint8)
    words: Words = np.zeros(len(text), dtype=np.uint64)
    for offset in range(LONGEST):
        words = (words << np.uint64(8)) | stream[offset : offset + len(text)]
    return words
