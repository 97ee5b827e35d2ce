"""How a model is trained, as a recipe says it. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from fledge.core.stage import Config
from fledge.core.units import Count
from fledge.models.dropout import Dropout
from fledge.training.strategies.settings import Unfreeze

Schedule: TypeAlias = Literal["linear", "cosine", "constant", "inverse_sqrt", "wsd", "ramp"]
SCHEDULES = (
    "what follows the warm-up; wsd is constant, then a linear decay over the last fifth; ramp rises exponentially from "
    "min_lr_ratio to the peak (for a rate range test)"
)
Optimizer: TypeAlias = Literal["adamw", "adamw8bit", "sgd", "muon", "adafactor"]
OPTIMIZERS = (
    "adamw; adamw8bit keeps the moments of the matrices inside the layers in a byte each (Dettmers et al., 2022; extra "
    "optim); muon for those matrices (Jordan, 2024) and adamw for the rest; or adafactor, whose state is a row and a "
    "column for each matrix (Shazeer and Stern, 2018)"
)


class TrainSettings(Config):
    """Optimiser, schedule and batch. A stage has its own defaults; what a recipe leaves out keeps them."""

    lr: float = Field(3e-4, gt=0, description="peak learning rate (with muon: of embeddings, norms and biases)")
    schedule: Schedule = Field("cosine", description=SCHEDULES)
    warmup: float = Field(0.03, ge=0, description="warm-up: a share of all steps below 1, else a number of steps")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where the schedule ends, as a share of the peak")
    batch_size: int = Field(32, gt=0, description="rows a step")
    epochs: float = Field(1.0, gt=0, description="how often to see the data")
    steps: Count | None = Field(None, gt=0, description="optimiser steps, instead of epochs")
    max_length: int = Field(512, gt=1, description="tokens a row; longer ones are cut at the end")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="format of the arithmetic; the weights that are trained stay in float32"
    )
    optimizer: Optimizer = Field("adamw", description=OPTIMIZERS)
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of muon's matrices")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of AdamW's two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's ε")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; not of norms, biases, embeddings")
    layer_lr_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="each layer's rate as a share of that of the layer above it (0.65 to 0.95: usual)",
    )
    freeze: list[str] = Field(
        default_factory=list, description="parameters to leave as they are, as globs: model.embed_tokens*, *.layers.0.*"
    )
    dropout: Dropout | None = Field(
        None, description="dropout by part, {attention: 0.1, hidden: 0.1}: of a model that exists, kept in its config"
    )
    unfreeze: Unfreeze | None = Field(
        None, description="train the head and the last layers first, and let the layers below join one after another"
    )
    l2_sp: float = Field(
        0.0, ge=0, description="½ α ‖θ − θ*‖² holds the weights near where they began (L2-SP; 0: not; 0.001 to 0.1)"
    )
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the gradient (0: no bound)")
    spike_sigmas: float = Field(
        0.0, ge=0, description="leave out a step that lies so many deviations above the last 128 (0: never; 6 is usual)"
    )
    rollbacks: int = Field(2, ge=0, description="how often a run that has gone astray may return to a checkpoint")
    evaluate_every: int = Field(
        0, ge=0, description="steps between measurements on the held-out rows (0: only before and after)"
    )
    patience: int = Field(
        0, ge=0, description="stop after so many of them without a better one, and keep the best weights (0: never)"
    )
    min_delta: float = Field(0.0, ge=0, description="by how much the loss must fall below the best one to be better")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints (0: about twice a minute)")
    log_every: int = Field(10, gt=0, description="steps between points of the curves")

    @property
    def extras(self) -> dict[str, str]:  # type: ignore[override]
        """The library of 8-bit optimisers, where one is asked for."""
        return {"bitsandbytes": "optim"} if self.optimizer == "adamw8bit" else {}

    @property
    def dropout_parts(self) -> dict[str, float]:
        """The parts whose dropout differs from what the model's folder says."""
        return self.dropout.parts() if self.dropout else {}

    statistics_every: int = Field(
        0, ge=0, description="steps between statistics of gradients, updates and activations by layer (0: never)"
    )
    diagnose: Literal["words", "off"] = Field(
        "words", description="say in words what ails a run, early, with the usual remedy"
    )


def flops_per_token(parameters: float, adapter: bool) -> float:
    """Floating-point operations to train on a token: 6 a parameter, 4 where only an adapter gets gradients."""
    return (4 if adapter else 6) * parameters
