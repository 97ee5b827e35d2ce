"""The model that a task is taught to: a language model, an encoder or an adapter opened with the head of the task."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fledge.core.artifact import TaskModel
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.models.adapters import LoRA, add_lora
from fledge.models.load import context_of, is_adapter, load_model, load_tokenizer
from fledge.models.save import save_model
from fledge.training.optimization.optimizer import freeze
from fledge.training.policy import Policy, keep_inputs
from fledge.training.settings import TrainSettings
from fledge.training.understanding.examples import Encoder

TaskHead: TypeAlias = Literal["sequence", "tokens", "body"]
PEFT_TASK = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "body": "FEATURE_EXTRACTION"}


@dataclass
class TaskPolicy(Policy):
    """A model with the head of a task, its tokenizer, and where its base lies if only an adapter is trained."""

    pad_id: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    """what a folder's `config.json` says of the task beside the family's own keys"""

    @property
    def context(self) -> int:
        """The longest text it takes, in tokens."""
        return context_of(self.model.config)

    def encoder(self, max_length: int) -> Encoder:
        """How texts become its rows, of `max_length` tokens at most."""
        end = self.tokenizer.eos_token_id if self.model.config.is_encoder_decoder else None
        return Encoder(self.tokenizer, min(max_length, self.context), end)

    def save(self, job: Job, metrics: dict[str, Any], template: str | None = None) -> TaskModel:  # type: ignore[override]
        """Write it to `job.out` (the first process does). An adapter's folder gets the task's config beside it."""
        if job.rank == 0:
            for name, value in self.config.items():
                setattr(self.model.config, name, value)
            save_model(self.model, self.tokenizer, job.out, template, self.base)
            if self.base is not None:
                self.model.config.save_pretrained(job.out)
        return TaskModel(job.out, {**self.parameters, **metrics})


def open_task(
    path: Path,
    head: TaskHead,
    labels: list[str],
    settings: TrainSettings,
    seed: int,
    device: str = "cpu",
    lora: LoRA | None = None,
) -> TaskPolicy:
    """The model in `path` with a `head` for `labels`, ready to be trained; with `lora`, only an adapter and the head.

    An adapter in `path` is merged into its base first. Raises FledgeError for a folder without a model, and for an
    adapter that is to get another one.
    """
    path = path.resolve()
    if is_adapter(path) and lora is not None:
        raise FledgeError(
            Problem(
                t("an adapter cannot be put on an adapter"),
                where="lora",
                found=str(path),
                fix=t("merge it into its base first, with the stage model.merge"),
            )
        )
    tokenizer = load_tokenizer(path)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    dtype = "float32" if lora is None else settings.dtype
    model: Any = load_model(path, dtype, device, head=head, labels=len(labels) or None, dropout=settings.dropout_parts)
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = pad  # transformers' heads read the last token that is not it
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
    if lora is None:
        freeze(model.requires_grad_(True), settings.freeze)
        return TaskPolicy(model, tokenizer, None, int(pad or 0))
    model = add_lora(model, lora, seed, PEFT_TASK[head], heads_of(model) if head != "body" else ())
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT leaves a new head in the format of the base
            parameter.data = parameter.data.float()
    freeze(model, settings.freeze)
    keep_inputs(model, settings)
    return TaskPolicy(model, tokenizer, path, int(pad or 0))


def heads_of(model: Any) -> list[str]:
    """The modules that a folder of a language model may lack: all beside the body, and the pooler inside BERT's."""
    body = model.base_model_prefix
    beside = [name for name, part in model.named_children() if name != body and any(True for _ in part.parameters())]
    return beside + [name for name, _ in model.named_modules() if name == f"{body}.pooler"]
