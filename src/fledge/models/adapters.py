"""Low-rank adapters through PEFT: put on, and (in `merging`) merged back with a proof that nothing was lost.

LoRA (Hu et al., 2021): h = Wx + (α / r) · B·A·x with A ∈ R^{r×k}, B ∈ R^{d×r} and B = 0 at the start, so that the
adapted model begins as exactly the base.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from pydantic import Field

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.core.stage import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRA(Config):
    """A low-rank adapter (Hu et al., 2021)."""

    rank: int = Field(16, gt=0, description="r, the rank of the update")
    alpha: float = Field(32.0, gt=0, description="α; the update is scaled by α / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    targets: list[str] | str = Field("all-linear", description="names of the linear layers to adapt, or all-linear")
    rslora: bool = Field(False, description="scale by α / √r instead (Kalajdzievski, 2023)")


def add_lora(
    model: PreTrainedModel, lora: LoRA, seed: int, task: str = "CAUSAL_LM", heads: Sequence[str] = ()
) -> PreTrainedModel:
    """`model` with fresh adapters: its own weights frozen, theirs trainable in fp32. Same seed, same adapters.

    The modules named in `heads` get none: they are trained whole, and saved with the adapter.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.rslora,
        task_type=task,
        modules_to_save=list(heads) or None,
        exclude_modules=rf"(?:{'|'.join(map(re.escape, heads))})(?:\..*)?" if heads else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return cast("PreTrainedModel", get_peft_model(model, config))
        except ValueError as error:
            linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            raise FledgeError(
                Problem(
                    t("the adapter fits no layer of this model"),
                    found=str(lora.targets),
                    allowed=listing(["all-linear", *sorted(linear)]),
                )
            ) from error


def lora_parameters(shapes: list[tuple[int, int]], rank: int) -> int:
    """Trainable parameters of a LoRA on matrices of `shapes` (d, k): Σ r · (d + k)."""
    return sum(rank * (d + k) for d, k in shapes)
