"""Denoising: −Σ log p(xₜ | x₍<ₜ₎, x̃), the whole text from a corrupted one (BART: Lewis et al., 2020, section 2.2).

What the corruption is, `data.tokens.corruption.denoising` says; the loss is that of any encoder-decoder, over every
token of the text and not only over those that were hidden.
"""

from __future__ import annotations

from fledge.training.objectives.span_corruption import SpanCorruption


class Denoising(SpanCorruption):
    """The mean over all tokens of the texts, in nats. Batches as for span corruption; the encoder's are padded."""
