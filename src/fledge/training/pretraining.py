"""`train.pretrain`: text into packed rows, a fresh model, the Trainer, and what the model makes of held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fledge.core.allocator import keep_few_products
from fledge.core.artifact import Model, Tokens
from fledge.core.job import Job
from fledge.data.tokens.packing import TokenShards
from fledge.data.tokens.rows import Prefetched
from fledge.models.architecture import Architecture
from fledge.models.build import build_model
from fledge.models.load import load_tokenizer
from fledge.models.save import save_model
from fledge.training.compiling import compiled
from fledge.training.corpus import epochs, excerpt, packed_here, rows_of, rows_with_replay, texts_of
from fledge.training.held_out import bits_per_byte, xz_bits_per_byte
from fledge.training.layout.ranks import Ranks, device_of
from fledge.training.lessons import Lesson, lesson
from fledge.training.ngrams import ByteNgrams
from fledge.training.objectives import config
from fledge.training.objectives.bidirectional import add_absolute_positions, is_deberta
from fledge.training.objectives.replaced_token import Electra
from fledge.training.optimization.optimizer import freeze
from fledge.training.policy import Policy
from fledge.training.trainer import Trainer

if TYPE_CHECKING:
    from fledge.training.stages import Pretrain


def pretrain(stage: Pretrain, job: Job) -> Model | dict[str, Model]:
    """Run the stage; the artifact's metrics are the acceptance numbers of a pre-training run.

    Replaced-token detection gives two models, `generator` and `discriminator`.
    """
    keep_few_products(stage.seq_len)
    folder, device = job.open(stage.tokenizer).path, device_of(job.execution)
    tokenizer, ranks = load_tokenizer(folder), Ranks.join(job.rank, job.world, device, job.execution.layout)
    sources = [job.open(ref) for ref in stage.data]
    settings, steps = stage.train, stage.steps
    taught = lesson(stage.objective, tokenizer, stage.seq_len, job.rng_seed("corruption"), stage.z_loss)
    names = [ref.text for ref in stage.data] if taught.corrupt is None else []
    size, seen = settings.batch_size, steps * settings.batch_size
    rows: Any
    if stage.replay:
        rows, metrics = rows_with_replay(sources, stage.replay, folder, tokenizer, taught.row, size, job, ranks, seen)
    else:
        rows, metrics = rows_of(sources, folder, tokenizer, taught.row, size, job, ranks, called=names)
        metrics["epochs"] = epochs(rows, seen)
    shape = stage.model.resolve(len(tokenizer), stage.seq_len, tokenizer.pad_token_id or 0)
    model: Any = build(stage.objective, shape, job, tokenizer, device)
    freeze(model, settings.freeze)
    texts = {code: excerpt(job.open(ref), stage.held_out_bytes, code) for code, ref in stage.held_out.items()}
    held_out = HeldOut(taught, model, tokenizer, texts, settings.dtype).packed(job, ranks)
    metrics["shape"] = vars(shape)
    metrics |= held_out.measured("untrained_")

    flops = shape.training_flops(stage.tokens, stage.seq_len) if taught.corrupt is None else 0.0
    with compiled(model, job.execution, flops, job.events), Prefetched(taught.source(rows)) as batches:
        metrics |= Trainer(
            taught.objective, {"model": model}, batches, settings, steps, job.rng_seed("steps"), job.events,
            job.checkpoints, job.execution.micro_batch, ranks, device,
            job.execution.activation_checkpointing == "on",
            held_out.loss if texts else None,
            keep_last=job.execution.keep_last,
        ).fit()  # fmt: skip

    metrics |= held_out.measured()
    if texts and ranks.first and taught.corrupt is None:
        plain = "" if isinstance(sources[0], Tokens) else "\n".join(texts_of(sources))
        metrics |= baselines(texts, plain)
    if metrics["tokens_per_second"]:
        job.events.metric("rate/train.flops", metrics["tokens_per_second"] * shape.training_flops(1, stage.seq_len))
    return save(model, tokenizer, job, metrics)


def build(asked: config.PretrainingObjective, shape: Architecture, job: Job, tokenizer: Any, device: str) -> Any:
    """A fresh model of `shape` with the head that the objective trains; for ELECTRA's a generator beside it."""
    seed = job.rng_seed("weights")
    if isinstance(asked, config.ReplacedToken):
        small = shape.generator(asked.generator)
        generator = build_model(small, job.rng_seed("generator"), tokenizer, device)
        return Electra(generator, build_model(replace(shape, head="discriminator"), seed, tokenizer, device))
    if isinstance(asked, config.Masked) and shape.family == "electra":
        return build_model(replace(shape, head="generator"), seed, tokenizer, device)
    model = build_model(shape, seed, tokenizer, device)
    if isinstance(asked, config.Masked) and asked.absolute_positions and is_deberta(model):
        add_absolute_positions(model, job.rng_seed("positions"))
    return model


def save(model: Any, tokenizer: Any, job: Job, metrics: dict[str, Any]) -> Model | dict[str, Model]:
    """Write the model (of a pair both, each to its folder) as what transformers loads."""
    if not isinstance(model, Electra):
        return Policy(model, tokenizer).save(job, metrics, tokenizer.chat_template)
    made = {}
    for name in ("generator", "discriminator"):
        part = getattr(model, name)
        if job.rank == 0:
            save_model(part, tokenizer, job.out / name, tokenizer.chat_template)
        made[name] = Model(job.out / name, {**Policy(part, tokenizer).parameters, **metrics})
    return made


@dataclass
class HeldOut:
    """Texts that are not trained on, by name, and what the model makes of them: bits per byte of a causal model, and
    what its objective measures of any other."""

    lesson: Lesson
    model: Any
    tokenizer: Any
    texts: Mapping[str, list[str]]
    dtype: str
    shards: dict[str, TokenShards] = field(default_factory=dict)

    def packed(self, job: Job, ranks: Ranks) -> HeldOut:
        """The same, with the texts as tokens in the work folder where the objective corrupts rows."""
        if self.lesson.corrupt:
            for name, texts in self.texts.items():
                self.shards[name] = packed_here(texts, self.tokenizer, job, ranks, f"held_out/{name}")
        return self

    def measured(self, prefix: str = "") -> dict[str, float]:
        """`bits_per_byte_en`, or `masked_nll_en`, `masked_accuracy_en` and so on, each with a prefix."""
        found = {}
        for name, texts in self.texts.items():
            if not self.lesson.corrupt:
                value = bits_per_byte(self.model, self.tokenizer, texts, dtype=self.dtype).value
                found[f"{prefix}bits_per_byte_{name}"] = value
                continue
            terms = self.lesson.measured(self.model, self.shards[name], self.dtype)
            kind = f"{prefix}{self.lesson.name}"
            found |= {f"{kind}_{term}_{name}": value for term, value in terms.items() if term != "loss"}
        return found

    def loss(self) -> float:
        """What the run is judged by on the way: the mean over the texts of bits per byte, or of the loss."""
        if not self.lesson.corrupt:
            found = list(self.measured().values())
        else:
            found = [self.lesson.measured(self.model, held, self.dtype)["loss"] for held in self.shards.values()]
        return sum(found) / len(found)


def baselines(texts: Mapping[str, list[str]], trained_on: str) -> dict[str, float]:
    """What `xz -9` makes of the held-out texts, and byte n-grams of the training text, where it is at hand."""
    ngrams = ByteNgrams(trained_on.encode()) if trained_on else None
    found: dict[str, float] = {}
    for code, held in texts.items():
        data = "".join(held).encode()
        found[f"xz_bits_per_byte_{code}"] = xz_bits_per_byte(data)
        if ngrams:
            found[f"ngram_bits_per_byte_{code}"] = ngrams.bits_per_byte(data)
        found[f"held_out_bytes_{code}"] = len(data)
    return found
