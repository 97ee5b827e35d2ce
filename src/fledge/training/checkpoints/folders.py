"""Checkpoints that are whole or not there: written beside, synced, renamed; checked by SHA-256 when read.

    step-00000200/  weights.safetensors  optimizer.safetensors  checkpoint.json (step, counters, digests)

Of the last two, a damaged newer one is recognised and the one before it is used.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fledge.core.artifact import sha256_of

MANIFEST = "checkpoint.json"
KEPT = 2


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back: steps done, the trainer's counters, and the damaged ones that were passed over."""

    step: int
    state: Mapping[str, Any]
    damaged: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one training run, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self,
        step: int,
        parameters: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        state: Mapping[str, Any],
        anchor_every: int = 0,
    ) -> None:
        """Write the checkpoint after `step` steps; older ones but for the last two, and the last two anchors, go.

        Anchors are those at multiples of `anchor_every` steps.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors, plain = _flatten([optimizer.state_dict() for optimizer in optimizers])
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, temporary / "weights.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        digests = {name: sha256_of(temporary / name) for name in ("weights.safetensors", "optimizer.safetensors")}
        manifest = {"step": step, "state": state, "optimizers": plain, "sha256": digests}
        (temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(self.folder)
        anchors = [folder for folder in self._all() if anchor_every and _step(folder) % anchor_every == 0]
        for old in set(self._all()[KEPT:]) - set(anchors[:KEPT]):
            shutil.rmtree(old)

    def forget_after(self, step: int) -> None:
        """Remove what was written after `step` steps: a run that returned there has taken another way."""
        for folder in self._all():
            if _step(folder) > step:
                shutil.rmtree(folder)

    def restore(
        self,
        parameters: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        latest: int | None = None,
        anchor_every: int = 0,
    ) -> Restored | None:
        """Load the newest whole checkpoint into the parameters and optimisers; None when there is none.

        With `latest` only an anchor after at most so many steps will do.
        """
        damaged = []
        for folder in self._all():
            if latest is not None and (_step(folder) > latest or not anchor_every or _step(folder) % anchor_every):
                continue
            manifest = _read(folder)
            if manifest is None:
                damaged.append(folder.name)
                continue
            weights = load_file(folder / "weights.safetensors")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name])
            tensors = load_file(folder / "optimizer.safetensors")
            for optimizer, state in zip(optimizers, _restore(manifest["optimizers"], tensors), strict=True):
                optimizer.load_state_dict(state)
            return Restored(manifest["step"], manifest["state"], tuple(damaged))
        return Restored(0, {}, tuple(damaged)) if damaged else None

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole checkpoint, or None when a file is missing, cut short or changed."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all(sha256_of(folder / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError):
        return None
    return manifest if whole else None


def _flatten(value: Any, prefix: str = "s", tensors: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Any]:
    """Nested state as (tensors by name, JSON in which a tensor is {"tensor": name} and integer keys survive)."""
    tensors = {} if tensors is None else tensors
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach().contiguous()
        return tensors, {"tensor": prefix}
    if isinstance(value, dict):
        items = [[key, _flatten(item, f"{prefix}.{key}", tensors)[1]] for key, item in value.items()]
        return tensors, {"items": items}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return tensors, {kind: [_flatten(item, f"{prefix}.{i}", tensors)[1] for i, item in enumerate(value)]}
    return tensors, value


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_flatten`."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "tensor":
            return tensors[inner]
        case "items":
            return {key: _restore(item, tensors) for key, item in inner}
        case "tuple":
            return tuple(_restore(item, tensors) for item in inner)
        case _:
            return [_restore(item, tensors) for item in inner]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
