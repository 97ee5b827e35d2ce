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
from fledge.core.stage import Estimate, Execution, Size, Stage
from fledge.core.units import Bytes, Count
from fledge.models.adapters import LoRA
from fledge.models.shape import ModelShape
from fledge.training.estimation import needs
from fledge.training.estimation.network import Network
from fledge.training.layout.check import Facts, check_layout
from fledge.training.objectives.config import AnyObjective, Causal, ReplacedToken
from fledge.training.search.usual import advice
from fledge.training.settings import OPTIMIZERS, SCHEDULES, Optimizer, Schedule, TrainSettings, flops_per_token
from fledge.training.strategies.settings import EWC, Forgetting, Replay


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


class Pretrain(Stage, use="train.pretrain", version=2):
    """A language model from scratch: text packed into rows, and each predicted from the part of it that is shown."""

    data: list[Ref[Tokens | Records]] = Field(
        min_length=1, description="texts, or conversations read as text; or what data.pack made of them"
    )
    tokenizer: Ref[Tokenizer] = Field(description="how text becomes tokens; it goes into the model's folder")
    model: ModelShape = Field(description="what to build")
    tokens: Count = Field(gt=0, description="tokens to train on, in all")
    seq_len: int = Field(256, gt=1, description="tokens a row (of span corruption: that the encoder reads)")
    objective: AnyObjective = Field(
        default_factory=Causal,
        description="causal, masked, replaced_token, span_corruption or denoising, or {name: {option: value}}",
    )
    train: PretrainSettings = Field(
        default_factory=PretrainSettings, description="optimiser, schedule, batch (epochs, steps, max_length unused)"
    )
    replay: Replay | None = Field(None, description="rows of other corpora among these, in an exact share")
    z_loss: float = Field(0.0, ge=0, description="weight of log² of the softmax's normaliser (PaLM's is 1e-4)")
    held_out: dict[str, Ref[Records]] = Field(
        default_factory=dict, description="held-out text by language code, for bits per byte, or the objective's loss"
    )
    held_out_bytes: Bytes = Field(100_000, gt=0, description="how much of each held-out text is measured")

    def run(self, job: Job) -> Model | dict[str, Model]:
        from fledge.training.pretraining import pretrain

        return pretrain(self, job)

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        pair = isinstance(self.objective, ReplacedToken)
        return {"generator": Model, "discriminator": Model} if pair else {"": Model}

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
        yield from self.objective.check(self.model.kind, self.model.family_name)
        if self.train.dropout:
            yield Problem(
                t("the dropout of a fresh model is part of the model"),
                where="train.dropout", fix=t("for example: {example}", example="model: {dropout: {hidden: 0.1}}"),
            )  # fmt: skip
        if self.z_loss and not isinstance(self.objective, Causal):
            yield Problem(t("z_loss goes with the causal objective"), found=self.objective.name)

    @property
    def pipelines(self) -> bool:
        return isinstance(self.objective, Causal)

    def check_execution(self, execution: Execution) -> Iterator[Problem]:
        problems = list(super().check_execution(execution))
        if execution.processes > 1 and not problems:
            facts, optimizer = Facts.of_shape(self.model.resolve(4096, self.seq_len)), self.train.optimizer
            problems += check_layout(facts, execution.layout, execution.processes, execution.device, optimizer)
        yield from problems

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        yield from advice("pretrain", self.train, self.model.resolve(4096, self.seq_len).parameters)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        shape = self.model.resolve(needs.vocabulary_of(sizes[self.tokenizer.text]), self.seq_len)
        flops = shape.training_flops(self.tokens, self.seq_len)
        seconds = flops / needs.rate(machine, "train.flops", needs.FLOPS)
        text = sum(sizes[ref.text].bytes for ref in self.data)
        other = 15 + text / 2e6 + 4 * len(self.held_out)
        made = Size(parameters=shape.parameters, bytes=4 * shape.parameters)
        network, causal = Network.of_shape(shape), isinstance(self.objective, Causal)
        if isinstance(self.objective, ReplacedToken):
            network = needs.with_generator(network, shape, self.objective.generator)
        plan = needs.plan_of(
            network, self.train, machine, sequence=self.seq_len, flops=flops * causal, packed=True,
            written=needs.written(self.objective, self.seq_len),
        )  # fmt: skip
        return needs.estimate_of(
            plan, machine, flops=flops, seconds=(0.7 * seconds + other, 2 * seconds + 2 * other),
            disk=4 * shape.parameters, sizes=dict.fromkeys(self.output_kinds(), made), beside=10 * text,
        )  # fmt: skip


class ContinueSettings(TrainSettings):
    """Settings for pre-training that goes on."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate (with muon: of embeddings, norms and biases)")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="where the schedule ends, as a share of the peak")
    batch_size: int = Field(16, gt=0, description="rows a step")


class Continue(Stage, use="train.continue", version=1):
    """Pre-training that goes on, on the text of a domain; the model keeps its tokenizer (Gururangan et al., 2020)."""

    model: Ref[Model] = Field(description="what to start from")
    data: list[Ref[Tokens | Records]] = Field(
        min_length=1, description="texts of the domain; or what data.pack made of them with the model's tokenizer"
    )
    tokens: Count = Field(gt=0, description="tokens to train on, in all")
    seq_len: int = Field(256, gt=1, description="tokens a row (of span corruption: that the encoder reads)")
    objective: AnyObjective | None = Field(
        None, description="causal, masked, span_corruption or denoising (default: what the model's head is for)"
    )
    replay: Replay | None = Field(None, description="rows of earlier corpora among the new ones")
    ewc: EWC | None = Field(
        None, description="hold weights that an earlier task needs (elastic weight consolidation; decoders)"
    )
    forgetting: Forgetting | None = Field(None, description="general data, measured before and after (decoders)")
    lora: LoRA | None = Field(None, description="train a low-rank adapter instead of all weights (decoders)")
    train: ContinueSettings = Field(
        default_factory=ContinueSettings, description="optimiser, schedule, batch (epochs, steps, max_length unused)"
    )
    held_out: dict[str, Ref[Records]] = Field(
        default_factory=dict, description="held-out text of the domain by name, measured before and after"
    )
    general: dict[str, Ref[Records]] = Field(
        default_factory=dict, description="held-out general text by name, which shows what is forgotten"
    )
    held_out_bytes: Bytes = Field(100_000, gt=0, description="how much of each held-out text is measured")

    def run(self, job: Job) -> Model:
        from fledge.training.continuing import go_on

        return go_on(self, job)

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        return {"": Adapter if self.lora else Model}

    @property
    def steps(self) -> int:
        """Optimiser steps: the tokens asked for, rounded up to whole batches."""
        return max(1, math.ceil(self.tokens / (self.train.batch_size * self.seq_len)))

    def check(self) -> Iterator[Problem]:
        if isinstance(self.objective, ReplacedToken):
            yield Problem(
                t("replaced tokens are told from scratch only: a generator goes with every discriminator"),
                fix="train.pretrain",
            )
        if self.lora and self.objective and not isinstance(self.objective, Causal):
            yield Problem(t("an adapter goes on with a causal model only"), found=self.objective.name)
        for name in ("ewc", "forgetting"):
            if getattr(self, name) and self.objective and not isinstance(self.objective, Causal):
                yield Problem(t("the old task's likelihood is known of causal models only"), where=name)

    @property
    def pipelines(self) -> bool:
        return self.objective is None or isinstance(self.objective, Causal)

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        yield from advice("continue", self.train, sizes[self.model.text].parameters, self.lora is not None)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        model = sizes[self.model.text]
        network, rank = needs.network_of(model), self.lora.rank if self.lora else 0
        flops = flops_per_token(network.parameters, rank > 0) * self.steps * self.train.batch_size * self.seq_len
        causal = isinstance(self.objective, Causal) or (self.objective is None and needs.is_decoder(model))
        plan = needs.plan_of(
            network, self.train, machine, sequence=self.seq_len, flops=flops * causal, lora_rank=rank, packed=True,
            written=needs.written(self.objective, self.seq_len, network.family), at_once=needs.CONTINUED,
        )  # fmt: skip
        return needs.tuning_estimate(plan, model, machine, flops, adapters=causal)


class SFT(Stage, use="train.sft", version=2):
    """Supervised fine-tuning on conversations, with the loss on the assistant's turns only."""

    model: Ref[Model] = Field(description="what to start from")
    data: list[Ref[Conversations]] = Field(min_length=1, description="conversations to learn from")
    held_out: Ref[Conversations] | None = Field(None, description="conversations on which the loss is measured")
    held_out_rows: int = Field(200, gt=0, description="how many of them, at most")
    packing: bool = Field(
        True, description="lay conversations end to end, kept apart from each other, instead of padding them"
    )
    lora: LoRA | None = Field(None, description="train a low-rank adapter instead of all weights")
    replay: Replay | None = Field(None, description="rows of earlier corpora among the new ones")
    ewc: EWC | None = Field(None, description="hold weights that an earlier task needs (elastic weight consolidation)")
    forgetting: Forgetting | None = Field(None, description="general data, measured before and after")
    train: TuneSettings = Field(default_factory=TuneSettings, description="optimiser, schedule, batch")

    @property
    def pipelines(self) -> bool:
        return True

    def run(self, job: Job) -> Model:
        from fledge.training.tuning import sft

        return sft(self, job)

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        return {"": Adapter if self.lora else Model}

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        yield from advice("sft", self.train, sizes[self.model.text].parameters, self.lora is not None)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        rows, rank = sum(sizes[ref.text].rows for ref in self.data), self.lora.rank if self.lora else 0
        model, packed = sizes[self.model.text], self.packing
        return needs.tuned(model, rows, self.train, machine, lora_rank=rank, adapters=True, packed=packed)


class RewardModelling(Stage, use="train.reward", version=2):
    """A reward model: the preferred of two answers should score higher (Ouyang et al., 2022)."""

    model: Ref[Model] = Field(description="what to start from")
    data: Ref[Preferences] = Field(description="ranked answers to learn from")
    held_out: Ref[Preferences] | None = Field(None, description="ranked answers on which the accuracy is measured")
    held_out_rows: int = Field(500, gt=0, description="how many of them, at most")
    train: PreferenceSettings = Field(default_factory=PreferenceSettings, description="optimiser, schedule, batch")

    def run(self, job: Job) -> RewardModel:
        from fledge.training.tuning import reward

        return reward(self, job)

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        yield from advice("reward", self.train, sizes[self.model.text].parameters)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        rows = sizes[self.data.text].rows
        return needs.tuned(sizes[self.model.text], rows, self.train, machine, texts=2, objective="ranks")


class DirectPreferences(Stage, use="train.dpo", version=2):
    """Direct preference optimisation (Rafailov et al., 2023); the reference is the model it starts from."""

    model: Ref[Model] = Field(description="what to start from; also the reference")
    data: Ref[Preferences] = Field(description="ranked answers to learn from")
    held_out: Ref[Preferences] | None = Field(None, description="ranked answers on which the accuracy is measured")
    held_out_rows: int = Field(500, gt=0, description="how many of them, at most")
    beta: float = Field(0.1, gt=0, description="strength of the KL constraint to the reference")
    lora: LoRA | None = Field(None, description="train a low-rank adapter instead of all weights")
    ewc: EWC | None = Field(None, description="hold weights that an earlier task needs (elastic weight consolidation)")
    forgetting: Forgetting | None = Field(None, description="general data, measured before and after")
    train: PreferenceSettings = Field(default_factory=PreferenceSettings, description="optimiser, schedule, batch")

    def run(self, job: Job) -> Model:
        from fledge.training.tuning import dpo

        return dpo(self, job)

    def check(self) -> Iterator[Problem]:
        if self.train.dropout:
            yield Problem(
                t("preferences are learned without dropout: the reference would drop out elsewhere"),
                where="train.dropout", fix=t("leave it out"),
            )  # fmt: skip

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        return {"": Adapter if self.lora else Model}

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        yield from advice("dpo", self.train, sizes[self.model.text].parameters, self.lora is not None, self.beta)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        rows = sizes[self.data.text].rows * (4 / 3)  # the reference is asked once: a forward pass more
        model, rank = sizes[self.model.text], self.lora.rank if self.lora else 0
        return needs.tuned(model, rows, self.train, machine, lora_rank=rank, texts=2, objective="pairs", adapters=True)
