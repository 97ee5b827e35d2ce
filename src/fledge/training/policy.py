"""The model that a stage trains: opened from what it was given, and written as what it became.

Without an adapter all weights are trained, in fp32 (an adapter that comes in is merged into its base first), and a
whole model goes out. With one, the base stays as it is, in the format of the arithmetic, and an adapter goes out:
a new one on a whole model, or the one that came in, trained further. The base of an adapter is always a folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.core.artifact import Adapter, Model
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.models.adapters import LoRA, add_lora
from fledge.models.load import base_of, context_of, is_adapter, load_model, load_tokenizer
from fledge.models.save import save_model
from fledge.training.optimization.optimizer import freeze
from fledge.training.settings import TrainSettings


@dataclass
class Policy:
    """A model to train, its tokenizer, and where its base lies if only an adapter is trained."""

    model: Any
    tokenizer: Any
    base: Path | None = None

    @property
    def context(self) -> int:
        """The longest text it takes, in tokens."""
        return context_of(self.model.config)

    @property
    def parameters(self) -> dict[str, int]:
        """How many parameters there are, and how many of them are trained."""
        counts = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return {"parameters": sum(n for n, _ in counts), "trained_parameters": sum(n for n, yes in counts if yes)}

    def save(self, job: Job, metrics: dict[str, Any], template: str | None = None) -> Model:
        """Write it to `job.out` (the first process does) as the artifact it is."""
        if job.rank == 0:
            save_model(self.model, self.tokenizer, job.out, template, self.base)
        return (Model if self.base is None else Adapter)(job.out, {**self.parameters, **metrics})


def open_policy(
    path: Path, settings: TrainSettings, lora: LoRA | None, seed: int, device: str = "cpu", reward: bool = False
) -> Policy:
    """The model in `path`, ready to be trained. Raises FledgeError when `lora` is not the adapter that is there."""
    tokenizer = load_tokenizer(path)
    if lora is None:
        model: Any = load_model(path, "float32", device, reward, dropout=settings.dropout_parts)
        model = model.merge_and_unload() if hasattr(model, "peft_config") else model
        freeze(model.requires_grad_(True), settings.freeze)
        return Policy(model, tokenizer)
    if is_adapter(path):
        model = load_model(path, settings.dtype, device, trainable=True, dropout=settings.dropout_parts)
        base = base_of(path)
        _require_same(model.peft_config["default"], lora)
    else:
        whole = load_model(path, settings.dtype, device, dropout=settings.dropout_parts)
        model, base = add_lora(whole, lora, seed), path
    freeze(model, settings.freeze)
    keep_inputs(model, settings)
    return Policy(model, tokenizer, base)


def keep_inputs(model: Any, settings: TrainSettings) -> None:
    """Autocast casts an adapter's small matrices; PEFT would cast every input to fp32 first."""
    for layer in model.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = settings.dtype == "float32"


def _require_same(there: Any, lora: LoRA) -> None:
    if (there.r, there.lora_alpha, there.use_rslora) != (lora.rank, lora.alpha, lora.rslora):
        raise FledgeError(
            Problem(
                t("an adapter that is trained further keeps its form"),
                where="lora",
                found=f"rank {lora.rank}, alpha {lora.alpha:g}",
                allowed=f"rank {there.r}, alpha {there.lora_alpha:g}",
                fix=t("give the same rank and alpha, or merge the adapter first"),
            )
        )
