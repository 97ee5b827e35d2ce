"""Replaced-token detection (ELECTRA: Clark et al., 2020): which tokens has a small masked language model put in?

    min Σ_x  L_MLM(x, θ_G) + λ · L_Disc(x, θ_D),   λ = 50

The generator predicts the masked tokens of a row, and one token is sampled from each of its predictions; the
discriminator says of every token of that row whether it is the original. A sample that happens to be the original
counts as original. Nothing flows back through the sampling. Both share one table of embeddings, and no more.

A token is sampled by inverting the distribution at a number in [0, 1) that comes with the batch, one for each token:
the same whatever the rows are divided into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.training.likelihood import IGNORED, Head, weighted_nll
from fledge.training.objective import Batch, Objective, Term
from fledge.training.objectives.bidirectional import encoder_states, head_over_vocabulary


class Electra(nn.Module):
    """A generator and a discriminator, which share their embeddings (section 3.2), as one thing to train."""

    def __init__(self, generator: Any, discriminator: Any) -> None:
        super().__init__()
        self.discriminator, self.generator = discriminator, generator
        generator.electra.embeddings = discriminator.electra.embeddings
        generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight

    @property
    def config(self) -> Any:
        """The discriminator's."""
        return self.discriminator.config

    @property
    def _no_split_modules(self) -> list[str]:
        """The names of the layers' classes, by which transformers' models tell what is one piece."""
        return list(self.discriminator._no_split_modules or ())

    def get_output_embeddings(self) -> nn.Module:
        """The generator's output layer."""
        head: nn.Module = self.generator.get_output_embeddings()
        return head

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        """Both compute activations again for the backward pass."""
        for model in (self.generator, self.discriminator):
            model.gradient_checkpointing_enable(options)

    def gradient_checkpointing_disable(self) -> None:
        """Both keep their activations."""
        for model in (self.generator, self.discriminator):
            model.gradient_checkpointing_disable()


class ReplacedToken(Objective):
    """Batches: masked `input_ids`, `labels` (the originals there, −100 elsewhere), `uniforms`, `position_ids`, and
    `attention_mask` of padded rows. `weight` is λ."""

    def __init__(self, weight: float = 50.0) -> None:
        self.weight = weight

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"generator": float((batch["labels"] != IGNORED).sum()), "discriminator": float(_attended(batch).sum())}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Σ −log p of the generator; the discriminator's logits (B, T), above 0 for replaced; and which ones were."""
        pair = models["model"]
        transform, head = head_over_vocabulary(pair.generator)
        at = batch["labels"] != IGNORED
        originals = batch["labels"][at]
        states = transform(encoder_states(pair.generator, batch)[at])
        nll, _ = weighted_nll(states, head, originals)
        guessed = sampled(states.detach(), head, batch["uniforms"][at])
        read = batch["input_ids"].masked_scatter(at, guessed)
        replaced = torch.zeros_like(at).masked_scatter(at, guessed != originals)
        logits = pair.discriminator.discriminator_predictions(
            encoder_states(pair.discriminator, {**batch, "input_ids": read})
        )
        return nll, logits, replaced

    def loss(self, outputs: tuple[Tensor, Tensor, Tensor], batch: Batch) -> dict[str, Term]:
        nll, logits, replaced = outputs
        weights, read = self.weights(batch), _attended(batch)
        exact = torch.promote_types(logits.dtype, torch.float32)
        logits, replaced = logits[read].to(exact), replaced[read]
        found, right = logits > 0, (logits > 0) == replaced
        hits = (found & replaced).sum()

        def measured(count: Tensor, of: Tensor) -> Term:
            return Term(count, float(of), coefficient=0.0)

        return {
            "generator": Term(nll, weights["generator"]),
            "discriminator": Term(
                F.binary_cross_entropy_with_logits(logits, replaced.to(exact), reduction="sum"),
                weights["discriminator"],
                self.weight,
            ),
            "accuracy": measured(right.sum(), read.sum()),
            "replaced": measured(replaced.sum(), read.sum()),
            "precision": measured(hits, found.sum()),
            "recall": measured(hits, replaced.sum()),
            "f1": measured(2 * hits, found.sum() + replaced.sum()),
        }


@torch.no_grad()
def sampled(states: Tensor, head: Head, uniforms: Tensor) -> Tensor:
    """A token (n,) from each softmax of the logits of states (n, D), by inverting it at `uniforms` (n,)."""
    found = [states.new_zeros(0, dtype=torch.long)]
    for rows, at in zip(states.split(1024), uniforms.split(1024), strict=True):
        with torch.autocast(states.device.type, enabled=False):
            logits = F.linear(rows.to(head.weight.dtype), head.weight, head.bias)
            ends = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)  # (n, V)
        token = torch.searchsorted(ends, at.double()[:, None] * ends[:, -1:], right=True).squeeze(1)
        found.append(token.clamp_max(ends.shape[1] - 1))
    return torch.cat(found)


def _attended(batch: Batch) -> Tensor:
    """(B, T) the tokens that are no padding."""
    return (
        batch["attention_mask"] > 0 if "attention_mask" in batch else torch.ones_like(batch["labels"], dtype=torch.bool)
    )
