"""An objective of pre-training made ready for a tokenizer: what is minimised, and how rows of tokens become batches.

One for each name that a recipe knows (`objectives.config`). Beside the corruption that teaches there is one that
measures: with a fixed seed, and for masked language models with every token masked exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.tokens.batches import Batch, PackedBatches
from fledge.data.tokens.corruption.chance import Corrupted, RowSource
from fledge.data.tokens.corruption.denoising import Denoising as DenoisingCorruption
from fledge.data.tokens.corruption.masking import EveryTokenOnce, Masking
from fledge.data.tokens.corruption.spans import SpanCorruption as SpanCorruptionOfRows
from fledge.data.tokens.corruption.spans import lengths, row_length
from fledge.data.tokens.corruption.surfaces import Surfaces, special_ids
from fledge.data.tokens.packing import TokenShards
from fledge.training.objective import Objective, as_batch
from fledge.training.objectives import config
from fledge.training.objectives.causal_lm import CausalLM
from fledge.training.objectives.denoising import Denoising
from fledge.training.objectives.masked_lm import MaskedLM
from fledge.training.objectives.replaced_token import ReplacedToken
from fledge.training.objectives.span_corruption import SpanCorruption

Corruption = Callable[[Batch, int], Mapping[str, Any]]
MEASURED_AT_ONCE = 16  # rows


@dataclass(frozen=True)
class Lesson:
    """What a model is taught by. `row` is the length of the rows that batches are made of, in tokens."""

    name: str
    objective: Objective
    row: int
    corrupt: Corruption | None = None
    """None: the rows as they are"""
    probe: Corruption | None = None
    """the corruption in which held-out text is measured"""
    folds: int = 1
    """how often it corrupts the same rows, otherwise each time"""

    def source(self, rows: RowSource) -> RowSource:
        """Batches of rows, corrupted as the objective wants them."""
        return Corrupted(rows, self.corrupt) if self.corrupt else rows

    @torch.inference_mode()
    def measured(self, model: Any, held: TokenShards, dtype: str = "float32") -> dict[str, float]:
        """The mean of every term of the loss over held-out text, and `loss`, their weighted sum."""
        assert self.probe is not None
        device = next(model.parameters()).device
        source = PackedBatches(held, self.row, 1, seed=0)
        source = PackedBatches(held, self.row, min(MEASURED_AT_ONCE, source.rows), seed=0)
        sums: dict[str, list[float]] = {}
        training = model.training
        model.eval()
        with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            for step in range(len(source)):
                rows = source.batch(step)
                for fold in range(self.folds):
                    batch = as_batch(self.probe(rows, step * self.folds + fold), device)
                    for name, term in self.objective.loss(
                        self.objective.forward({"model": model}, batch), batch
                    ).items():
                        found = sums.setdefault(name, [0.0, 0.0, term.coefficient])
                        found[0] += float(term.sum)
                        found[1] += float(term.weight)
        model.train(training)
        means = {name: total / weight if weight else 0.0 for name, (total, weight, _) in sums.items()}
        return {**means, "loss": sum(sums[name][2] * value for name, value in means.items())}


def lesson(asked: config.PretrainingObjective, tokenizer: Any, seq_len: int, seed: int, z_loss: float = 0.0) -> Lesson:
    """The lesson that a recipe asks for. Raises FledgeError where the tokenizer lacks a token that it needs."""
    if isinstance(asked, config.Masked):
        return _masked(asked, tokenizer, seq_len, seed)
    if isinstance(asked, config.ReplacedToken):
        masking = Masking(mask_of(tokenizer), special_ids(tokenizer), seed, asked.rate, keep=0.0, random=0.0)
        probe = Masking(masking.mask, masking.special, 0, asked.rate, keep=0.0, random=0.0)
        return Lesson(asked.name, ReplacedToken(asked.weight), seq_len, masking, probe)
    if isinstance(asked, config.SpanCorruption):
        return _spans(asked, tokenizer, seq_len, seed)
    if isinstance(asked, config.Denoising):
        return _denoising(asked, tokenizer, seq_len, seed)
    return Lesson(asked.name, CausalLM(z_loss), seq_len)


def _masked(asked: config.Masked, tokenizer: Any, seq_len: int, seed: int) -> Lesson:
    mask, special = mask_of(tokenizer), special_ids(tokenizer)
    words = Surfaces(tokenizer) if asked.whole_word else None
    masking = Masking(mask, special, seed, asked.rate, asked.keep, asked.random, words)
    folds = max(1, round(1 / asked.rate))
    return Lesson(asked.name, MaskedLM(), seq_len, masking, EveryTokenOnce(Masking(mask, special, 0), folds), folds)


def _spans(asked: config.SpanCorruption, tokenizer: Any, seq_len: int, seed: int) -> Lesson:
    row = row_length(seq_len, asked.rate, asked.mean)
    vocabulary, needed = tokenizer.get_vocab(), lengths(row, asked.rate, asked.mean).spans
    names = [f"<extra_id_{number}>" for number in range(needed)]
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise FledgeError(
            Problem(
                t("the tokenizer has too few sentinels for the spans of a row"),
                where="tokenizer",
                found=str(needed - len(missing)),
                allowed=str(needed),
                fix=t("train it with objective: {name}, or take shorter rows", name=asked.name),
            )
        )
    sentinels = [vocabulary[name] for name in names]

    def corruption(seed: int) -> SpanCorruptionOfRows:
        return SpanCorruptionOfRows(sentinels, _end(tokenizer), _pad(tokenizer), seed, asked.rate, asked.mean)

    return Lesson(asked.name, SpanCorruption(), row, corruption(seed), corruption(0))


def _denoising(asked: config.Denoising, tokenizer: Any, seq_len: int, seed: int) -> Lesson:
    mask, special = mask_of(tokenizer), special_ids(tokenizer)
    sentences = Surfaces(tokenizer) if asked.permute else None

    def corruption(seed: int) -> DenoisingCorruption:
        return DenoisingCorruption(
            mask, _pad(tokenizer), special, seed, asked.infill, asked.mean, asked.mask, asked.delete, asked.rotate,
            sentences,
        )  # fmt: skip

    return Lesson(asked.name, Denoising(), seq_len, corruption(seed), corruption(0))


def mask_of(tokenizer: Any) -> int:
    """The id of the tokenizer's mask. Raises FledgeError where it has none."""
    if tokenizer.mask_token_id is None:
        raise FledgeError(
            Problem(
                t("the tokenizer has no mask token"),
                where="tokenizer",
                fix=t("train it with objective: {name}", name="masked"),
            )
        )
    return int(tokenizer.mask_token_id)


def _end(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id)


def _pad(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else _end(tokenizer))
