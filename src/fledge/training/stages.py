"""The stages of this floor: pre-training, supervised fine-tuning, reward modelling, direct preference optimisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from fledge.core.artifact import (
    Adapter,
    Artifact,
    Conversations,
    Model,
    Preferences,
    Records,
    RewardModel,
    Tokenizer,
    Tokens,
)
from fledge.core.errors import Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.stage import Estimate, Size, Stage
from fledge.core.units import Bytes, Count
from fledge.models.adapters import LoRA
from fledge.models.shape import ModelShape
from fledge.training.settings import OPTIMIZERS, SCHEDULES, Optimizer, Schedule, TrainSettings, flops_per_token

FLOPS = 80e9  # a second and core, until this machine has been measured
TOKENS_A_ROW = 150  # of a conversation, where nothing is known


class PretrainSettings(TrainSettings):
    """Settings for a model from scratch."""

    lr: float = Field(3e-3, gt=0, description="peak learning rate (with muon: of embeddings, norms and biases)")
    warmup: float = Field(0.05, ge=0, description="warm-up: a share of all steps below 1, else a number of steps")
    schedule: Schedule = Field("linear", description=SCHEDULES)
    optimizer: Optimizer = Field("muon", description=OPTIMIZERS)


class TuneSettings(TrainSettings):
    """Settings for a model that exists."""

    lr: float = Field(2e-5, gt=0, description="peak learning rate (with muon: of embeddings, norms and biases)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; not of norms, biases, embeddings")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of AdamW's two moments")
    batch_size: int = Field(16, gt=0, description="rows a step (pairs, where there are two answers)")


class PreferenceSettings(TuneSettings):
    """Settings for learning from preferences."""

    lr: float = Field(1e-5, gt=0, description="peak learning rate (with muon: of embeddings, norms and biases)")
    warmup: float = Field(0.1, ge=0, description="warm-up: a share of all steps below 1, else a number of steps")


class Pretrain(Stage, use="train.pretrain", version=1):
    """A language model from scratch: text packed into rows, every token predicted from those before it."""

    data: list[Ref[Tokens | Records]] = Field(
        min_length=1, description="texts, or conversations read as text; or what data.pack made of them"
    )
    tokenizer: Ref[Tokenizer] = Field(description="how text becomes tokens; it goes into the model's folder")
    model: ModelShape = Field(description="what to build")
    tokens: Count = Field(gt=0, description="tokens to train on, in all")
    seq_len: int = Field(256, gt=1, description="tokens a row")
    train: PretrainSettings = Field(
        default_factory=PretrainSettings, description="optimiser, schedule, batch (epochs, steps, max_length unused)"
    )
    z_loss: float = Field(0.0, ge=0, description="weight of log² of the softmax's normaliser (PaLM's is 1e-4)")
    held_out: dict[str, Ref[Records]] = Field(
        default_factory=dict, description="held-out text by language code, for bits per byte"
    )
    held_out_bytes: Bytes = Field(100_000, gt=0, description="how much of each held-out text is measured")

    def run(self, job: Job) -> Model:
        from fledge.training.pretraining import pretrain

        return pretrain(self, job)

    @property
    def steps(self) -> int:
        """Optimiser steps: the tokens asked for, rounded up to whole batches."""
        return max(1, math.ceil(self.tokens / (self.train.batch_size * self.seq_len)))

    def check(self) -> Iterator[Problem]:
        if self.model.context is not None and self.model.context < self.seq_len:
            yield Problem(
                t("rows are longer than the model's context"),
                found=f"seq_len: {self.seq_len}",
                allowed=t("at most {value}", value=self.model.context),
            )

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        shape = self.model.resolve(4096, self.seq_len)
        flops = shape.training_flops(self.tokens, self.seq_len)
        seconds = flops / machine.rate("train.flops", FLOPS)
        text = sum(sizes[ref.text].bytes for ref in self.data)
        other = 15 + text / 2e6 + 4 * len(self.held_out)
        logits = self.train.batch_size * self.seq_len * shape.hidden * shape.layers * 60
        memory = 0.6e9 + 16 * shape.parameters + logits + 10 * text
        made = Size(parameters=shape.parameters, bytes=4 * shape.parameters)
        return Estimate(
            (0.7 * seconds + other, 2 * seconds + 2 * other),
            (0.8 * memory, 1.5 * memory),
            4 * shape.parameters,
            {"": made},
        )


class SFT(Stage, use="train.sft", version=1):
    """Supervised fine-tuning on conversations, with the loss on the assistant's turns only."""

    model: Ref[Model] = Field(description="what to start from")
    data: list[Ref[Conversations]] = Field(min_length=1, description="conversations to learn from")
    held_out: Ref[Conversations] | None = Field(None, description="conversations on which the loss is measured")
    held_out_rows: int = Field(200, gt=0, description="how many of them, at most")
    lora: LoRA | None = Field(None, description="train a low-rank adapter instead of all weights")
    train: TuneSettings = Field(default_factory=TuneSettings, description="optimiser, schedule, batch")

    def run(self, job: Job) -> Model:
        from fledge.training.tuning import sft

        return sft(self, job)

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        return {"": Adapter if self.lora else Model}

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        rows = sum(sizes[ref.text].rows for ref in self.data)
        return _estimate(sizes[self.model.text], rows, 1, self.train, self.lora, machine)


class RewardModelling(Stage, use="train.reward", version=1):
    """A reward model: the preferred of two answers should score higher (Ouyang et al., 2022)."""

    model: Ref[Model] = Field(description="what to start from")
    data: Ref[Preferences] = Field(description="ranked answers to learn from")
    held_out: Ref[Preferences] | None = Field(None, description="ranked answers on which the accuracy is measured")
    held_out_rows: int = Field(500, gt=0, description="how many of them, at most")
    train: PreferenceSettings = Field(default_factory=PreferenceSettings, description="optimiser, schedule, batch")

    def run(self, job: Job) -> RewardModel:
        from fledge.training.tuning import reward

        return reward(self, job)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        return _estimate(sizes[self.model.text], sizes[self.data.text].rows, 2, self.train, None, machine)


class DirectPreferences(Stage, use="train.dpo", version=1):
    """Direct preference optimisation (Rafailov et al., 2023); the reference is the model it starts from."""

    model: Ref[Model] = Field(description="what to start from; also the reference")
    data: Ref[Preferences] = Field(description="ranked answers to learn from")
    held_out: Ref[Preferences] | None = Field(None, description="ranked answers on which the accuracy is measured")
    held_out_rows: int = Field(500, gt=0, description="how many of them, at most")
    beta: float = Field(0.1, gt=0, description="strength of the KL constraint to the reference")
    lora: LoRA | None = Field(None, description="train a low-rank adapter instead of all weights")
    train: PreferenceSettings = Field(default_factory=PreferenceSettings, description="optimiser, schedule, batch")

    def run(self, job: Job) -> Model:
        from fledge.training.tuning import dpo

        return dpo(self, job)

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        return {"": Adapter if self.lora else Model}

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        rows = sizes[self.data.text].rows * (4 / 3)  # the reference is asked once: a forward pass more
        return _estimate(sizes[self.model.text], rows, 2, self.train, self.lora, machine)


def _estimate(
    model: Size, rows: float, answers: int, train: TrainSettings, lora: LoRA | None, machine: Any
) -> Estimate:
    """Time and memory for `rows` rows of `answers` texts each; conversations are guessed at 150 tokens."""
    parameters = model.parameters or 2.4e6
    seen = train.steps * train.batch_size if train.steps else train.epochs * (rows or 2000)
    tokens = seen * answers * min(train.max_length, TOKENS_A_ROW)
    seconds = flops_per_token(parameters, lora is not None) * tokens / machine.rate("tune.flops", FLOPS)
    held = (4 if lora and train.dtype == "float32" else 2.5 if lora else 16) * parameters
    disk = 0.02 * parameters * 4 if lora else 4 * parameters
    made = Size(parameters=parameters, bytes=4 * parameters)
    return Estimate((8 + 0.5 * seconds, 20 + 2.5 * seconds), (0.6e9 + held, 1.5e9 + 1.5 * held), disk, {"": made})
