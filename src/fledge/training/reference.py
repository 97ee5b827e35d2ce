"""The frozen side of DPO: log-probabilities of every pair under the policy as it is before the first step.

Computed once, in the same batches and micro-batches as the first epoch's training steps, so that in those steps the
policy's numbers start out equal to the reference's bit for bit. Kept in the stage's work folder: after the first
step the policy is no longer the reference, so a resumed run reads them back.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fledge.training.objective import Batch, BatchSource, as_batch, rows_of


class WithReference:
    """A source of pairs that adds `reference` (B, 2) to every batch."""

    def __init__(self, source: BatchSource, known: dict[str, Tensor]) -> None:
        self.source, self.known, self.largest = source, known, getattr(source, "largest", None)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The source's batch of `step`, with the reference's log-probabilities of its pairs."""
        batch = as_batch(self.source.batch(step))
        return {**batch, "reference": torch.stack([self.known[key] for key in keys(batch)])}


def reference_logprobs(
    source: BatchSource,
    steps: int,
    logprobs: Callable[[Batch], Tensor],
    file: Path,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Every pair's (chosen, rejected) log-probabilities by the pair's key, from `file` or computed and kept there.

    `steps` is an epoch; `logprobs(batch)` asks the policy: (B, 2).
    """
    if file.is_file():
        return load_file(file)
    known: dict[str, Tensor] = {}
    for step in range(steps):
        batch = as_batch(source.batch(step), device)
        found = logprobs(batch).cpu()
        for row, key in enumerate(keys(batch)):
            known.setdefault(key, found[row].clone())
        progress(step + 1, steps)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file(known, temporary)
    temporary.replace(file)
    return known


def keys(batch: Batch) -> list[str]:
    """A name for every pair of a batch: a hash of its tokens and labels, padding aside."""
    names = []
    for row in range(rows_of(batch)):
        digest = hashlib.sha256()
        for name in ("chosen", "rejected"):
            length: Any = int(batch[f"{name}.attention_mask"][row].sum())
            for what in ("input_ids", "labels"):
                digest.update(batch[f"{name}.{what}"][row, :length].to(torch.int64).cpu().numpy().tobytes())
            digest.update(b"|")
        names.append(digest.hexdigest()[:32])
    return names
