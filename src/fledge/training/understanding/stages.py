"""The stages of this room: classification, tagging, embeddings, and weights that learn such tasks from little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from fledge.core.artifact import (
    Artifact,
    Conversations,
    Documents,
    Labelled,
    Model,
    Preferences,
    RewardModel,
    TaskModel,
)
from fledge.core.errors import Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.stage import Estimate, Execution, Size, Stage
from fledge.models.adapters import LoRA
from fledge.training.estimation import needs
from fledge.training.search.usual import advice
from fledge.training.settings import OPTIMIZERS, SCHEDULES, Optimizer, Schedule, TrainSettings, flops_per_token

TOKENS_A_ROW = 100  # of a text, where nothing is known

MODEL = "what to start from: a language model or an encoder"


class TaskSettings(TrainSettings):
    """Settings for teaching a task to a model that exists (Devlin et al., 2019, appendix A.3)."""

    lr: float = Field(3e-5, gt=0, description="peak learning rate (with muon: of embeddings, norms and biases)")
    warmup: float = Field(0.1, ge=0, description="warm-up: a share of all steps below 1, else a number of steps")
    schedule: Schedule = Field("linear", description=SCHEDULES)
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay of matrices; not of norms, biases, embeddings")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of AdamW's two moments")
    epochs: float = Field(3.0, gt=0, description="how often to see the data")
    max_length: int = Field(256, gt=1, description="tokens a row; longer ones are cut at the end")


class EmbedSettings(TaskSettings):
    """Settings for contrastive learning (Gao et al., 2021, appendix A)."""

    batch_size: int = Field(64, gt=1, description="texts a step: each is told apart from all others of its batch")
    epochs: float = Field(1.0, gt=0, description="how often to see the data")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; not of norms, biases, embeddings")


class MetaSettings(TrainSettings):
    """Settings of the outer loop (Nichol et al., 2018, appendix A)."""

    lr: float = Field(1.0, gt=0, description="ε: how far to go towards what the tasks have learned; 1 is all the way")
    optimizer: Optimizer = Field("sgd", description=OPTIMIZERS)
    schedule: Schedule = Field("linear", description=SCHEDULES)
    warmup: float = Field(0.0, ge=0, description="warm-up: a share of all steps below 1, else a number of steps")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; not of norms, biases, embeddings")
    batch_size: int = Field(5, gt=0, description="tasks a step")
    grad_clip: float = Field(0.0, ge=0, description="largest norm of the gradient (0: no bound)")
    max_length: int = Field(256, gt=1, description="tokens a row; longer ones are cut at the end")


class TaskStage(Stage):
    """What the stages of this room share: whole copies of the model, each with its share of the rows."""

    def check_execution(self, execution: Execution) -> Iterator[Problem]:
        problems = list(super().check_execution(execution))
        if execution.processes > 1 and not problems:
            layout = execution.layout.resolve(execution.processes)
            if layout.replicate != execution.processes:
                problems.append(
                    Problem(
                        t("a model with the head of a task is trained in whole copies only"),
                        where="execution.layout",
                        fix=t("for example: {example}", example="execution: {layout: ddp}"),
                    )
                )
        yield from problems

    def task_estimate(self, sizes: Mapping[str, Size], machine: Any, objective: str, texts: int = 1) -> Estimate:
        """Time and memory for the rows of `data`, of so many texts each."""
        asked: Any = self
        rows = sum(sizes[ref.text].rows for ref in asked.data)
        return needs.tuned(
            sizes[asked.model.text], rows, asked.train, machine, lora_rank=asked.lora.rank if asked.lora else 0,
            texts=texts, mean=TOKENS_A_ROW, objective=objective, adapters=True,
        )  # fmt: skip


class Classify(TaskStage, use="train.classify", version=1):
    """A model that puts texts into classes; accuracy and F1 on held-out texts."""

    model: Ref[Model | TaskModel | RewardModel] = Field(description=MODEL)
    data: list[Ref[Labelled]] = Field(min_length=1, description="labelled texts to learn from")
    held_out: Ref[Labelled] | None = Field(None, description="labelled texts on which it is measured")
    held_out_rows: int = Field(2000, gt=0, description="how many of them, at most")
    class_weights: dict[str, float] | Literal["balanced"] | None = Field(
        None,
        description="weight of each class in the loss, 1 where none is given; balanced: rows ÷ (classes · rows of it)",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that is spread over all classes")
    lora: LoRA | None = Field(None, description="train a low-rank adapter and the head instead of all weights")
    train: TaskSettings = Field(default_factory=TaskSettings, description="optimiser, schedule, batch")

    def run(self, job: Job) -> TaskModel:
        from fledge.training.understanding.classify import classify

        return classify(self, job)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        return self.task_estimate(sizes, machine, "labels")

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        yield from advice("classify", self.train, sizes[self.model.text].parameters, self.lora is not None)


class Tag(TaskStage, use="train.tag", version=1):
    """A model that marks entities in texts, word by word (BIO); Chinese character by character."""

    model: Ref[Model | TaskModel | RewardModel] = Field(description=MODEL)
    data: list[Ref[Labelled]] = Field(min_length=1, description="texts with their entities")
    held_out: Ref[Labelled] | None = Field(None, description="texts with their entities, on which it is measured")
    held_out_rows: int = Field(2000, gt=0, description="how many of them, at most")
    align: Literal["first", "last"] = Field(
        "first", description="the token of a word that carries its tag; last suits models that only look back"
    )
    lora: LoRA | None = Field(None, description="train a low-rank adapter and the head instead of all weights")
    train: TaskSettings = Field(default_factory=TaskSettings, description="optimiser, schedule, batch")

    def run(self, job: Job) -> TaskModel:
        from fledge.training.understanding.tag import tag

        return tag(self, job)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        return self.task_estimate(sizes, machine, "labels")

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        yield from advice("tag", self.train, sizes[self.model.text].parameters, self.lora is not None)


class Embed(TaskStage, use="train.embed", version=1):
    """A model that turns texts into vectors, those of like meaning near to each other (contrastive learning).

    Conversations pair a question with its answer, preferences a prompt with its best answer and its worst as a hard
    negative. Documents and labelled texts are paired with themselves under other dropout (SimCSE).
    """

    model: Ref[Model | TaskModel | RewardModel] = Field(description=MODEL)
    data: list[Ref[Documents | Labelled | Conversations | Preferences]] = Field(
        min_length=1, description="texts or pairs to learn from"
    )
    held_out: Ref[Documents | Labelled | Conversations | Preferences] | None = Field(
        None, description="pairs on which recall is measured; of a document, its first half finds its second"
    )
    held_out_rows: int = Field(500, gt=1, description="how many of them, at most")
    pooling: Literal["mean", "last", "cls"] = Field(
        "mean", description="the text's vector: the mean over its tokens, that of the last one, or of the first"
    )
    temperature: float = Field(0.05, gt=0, description="τ: the lower, the more the nearest negatives count")
    lora: LoRA | None = Field(None, description="train a low-rank adapter instead of all weights")
    train: EmbedSettings = Field(default_factory=EmbedSettings, description="optimiser, schedule, batch")

    def run(self, job: Job) -> TaskModel:
        from fledge.training.understanding.embed import embed

        return embed(self, job)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        return self.task_estimate(sizes, machine, "texts", texts=2)

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        yield from advice("embed", self.train, sizes[self.model.text].parameters, self.lora is not None)


class Meta(TaskStage, use="train.meta", version=1):
    """Weights from which a few examples and a few steps teach a new task (Reptile)."""

    model: Ref[Model | TaskModel | RewardModel] = Field(description=MODEL)
    data: list[Ref[Labelled | Conversations]] = Field(
        min_length=1, description="labelled texts (a task is a few of the classes), or conversations in groups"
    )
    held_out: Ref[Labelled | Conversations] | None = Field(
        None, description="tasks on which learning from little is measured, from the model as it was and as it is"
    )
    learn: Literal["classes", "answers"] = Field(
        "classes", description="what a task teaches: which class a text has, or how a group of conversations answers"
    )
    group: str = Field(
        "", description="the key of the records' meta that names a row's group (source: where it is from)"
    )
    ways: int = Field(5, gt=0, description="classes of a task (of answers: 1)")
    shots: int = Field(5, gt=0, description="examples of each class from which it is learned")
    inner_steps: int = Field(8, gt=0, description="steps on each task")
    inner_batch: int = Field(10, gt=0, description="rows of such a step")
    inner_lr: float = Field(1e-3, gt=0, description="learning rate on the task")
    inner_optimizer: Literal["adam", "sgd"] = Field("adam", description="adam with β₁ = 0 (as in the paper), or sgd")
    test_tasks: int = Field(20, gt=0, description="tasks that are measured")
    test_steps: int = Field(16, gt=0, description="steps on each of them")
    test_queries: int = Field(10, gt=0, description="further examples of each class on which it is then measured")
    train: MetaSettings = Field(default_factory=lambda: MetaSettings(steps=200), description="the outer loop")

    def run(self, job: Job) -> TaskModel:
        from fledge.training.understanding.meta import meta

        return meta(self, job)

    def output_kinds(self) -> Mapping[str, type[Artifact]]:
        return {"": TaskModel if self.learn == "classes" else Model}

    def check(self) -> Iterator[Problem]:
        if self.learn == "answers" and not self.group:
            yield Problem(
                t("conversations are tasks by their groups"),
                where="group",
                fix=t("name the key of their meta that says to which group one belongs, or source"),
            )
        if self.learn == "classes" and self.ways < 2:
            yield Problem(t("a task needs at least two classes"), where="ways", found=str(self.ways))

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        model, train = sizes[self.model.text], self.train
        network = needs.network_of(model)
        rows = (train.steps or 200) * train.batch_size * self.inner_steps * self.inner_batch
        flops = flops_per_token(network.parameters, False) * rows * min(train.max_length, TOKENS_A_ROW)
        copies = 4 if self.inner_optimizer == "adam" else 2  # of the task, of what all have learned, and two moments
        objective = "labels" if self.learn == "classes" else "tokens"
        plan = needs.plan_of(
            network, train, machine, sequence=train.max_length, rows=self.inner_batch, objective=objective,
            frozen=copies * network.parameters,
        )  # fmt: skip
        return needs.tuning_estimate(
            replace(plan, micro_batch=self.inner_batch, accumulated=False), model, machine, flops, rows="inner_batch"
        )

    def advice(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        yield from advice("meta", self.train, sizes[self.model.text].parameters, False)
