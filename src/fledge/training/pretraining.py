"""`train.pretrain`: text into packed token shards, a fresh model, the Trainer, and bits per byte on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.artifact import Artifact, Model, Tokens, sha256_of
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.store import home
from fledge.data.tokens.batches import PackedBatches
from fledge.data.tokens.packing import TokenShards, pack_texts
from fledge.data.tokens.rows import Prefetched, RowBatches, TokenRows
from fledge.models.build import build_model
from fledge.models.load import load_tokenizer
from fledge.records import shards
from fledge.records.kinds import Document
from fledge.training.compiling import compile_layers, decide, forget
from fledge.training.held_out import bits_per_byte, separator_id, xz_bits_per_byte
from fledge.training.layout.ranks import Ranks, device_of
from fledge.training.ngrams import ByteNgrams
from fledge.training.objectives.causal_lm import CausalLM
from fledge.training.optimization.optimizer import freeze
from fledge.training.policy import Policy
from fledge.training.trainer import Trainer

if TYPE_CHECKING:
    from fledge.training.stages import Pretrain


def pretrain(stage: Pretrain, job: Job) -> Model:
    """Run the stage; the artifact's metrics are the acceptance numbers of a pre-training run."""
    tokenizer, device = load_tokenizer(job.open(stage.tokenizer).path), device_of(job.execution)
    ranks = Ranks.join(job.rank, job.world, device)
    sources = [job.open(ref) for ref in stage.data]
    settings, steps = stage.train, stage.steps
    source, metrics = _batches(sources, stage, tokenizer, job, ranks)
    shape = stage.model.resolve(len(tokenizer), stage.seq_len)
    model: Any = build_model(shape, job.rng_seed("weights"), tokenizer, device)
    freeze(model, settings.freeze)
    held_out = {code: excerpt(job.open(ref), stage.held_out_bytes, code) for code, ref in stage.held_out.items()}
    metrics["shape"] = vars(shape)
    metrics |= _measure(model, tokenizer, held_out, "untrained_bits_per_byte", settings.dtype)

    compiled, message = decide(job.execution, shape.training_flops(stage.tokens, stage.seq_len))
    if message:
        job.events.message(message)
    layers = compile_layers(model, home() / "cache") if compiled else []
    with Prefetched(source) as batches:
        metrics |= Trainer(
            CausalLM(stage.z_loss), {"model": model}, batches, settings, steps, job.rng_seed("steps"), job.events,
            job.work / "checkpoints", job.execution.micro_batch, ranks, device,
            job.execution.activation_checkpointing == "on",
            (lambda: _mean_bits(model, tokenizer, held_out, settings.dtype)) if held_out else None,
        ).fit()  # fmt: skip
    forget(layers)

    metrics |= _measure(model, tokenizer, held_out, "bits_per_byte", settings.dtype)
    if held_out and ranks.first:
        ngrams = None if isinstance(sources[0], Tokens) else ByteNgrams("\n".join(_texts(sources)).encode())
        for code, texts in held_out.items():
            data = "".join(texts).encode()
            metrics[f"xz_bits_per_byte_{code}"] = xz_bits_per_byte(data)
            if ngrams:
                metrics[f"ngram_bits_per_byte_{code}"] = ngrams.bits_per_byte(data)
            metrics[f"held_out_bytes_{code}"] = len(data)
    if metrics["tokens_per_second"]:
        job.events.metric("rate/train.flops", metrics["tokens_per_second"] * shape.training_flops(1, stage.seq_len))
    return Policy(model, tokenizer).save(job, metrics, tokenizer.chat_template)


def excerpt(source: Artifact, size: int, language: str = "") -> list[str]:
    """The first texts of `source`, `size` bytes in all; the last one is cut between two characters.

    With a language, texts known to be in another one are passed over.
    """
    found, left = [], size
    for text in _texts([source], language):
        text = text.encode()[:left].decode(errors="ignore")
        if not text:
            break
        found.append(text)
        left -= len(text.encode())
    if not found:
        raise FledgeError(Problem(t("there is no held-out text"), where=str(source.path)))
    return found


def _texts(sources: Iterable[Artifact], language: str = "") -> Iterator[str]:
    for source in sources:
        for record in shards.read(source, "documents"):
            assert isinstance(record, Document)
            if record.text and (not language or record.language in ("", language)):
                yield record.text


def _batches(
    sources: list[Artifact], stage: Pretrain, tokenizer: Any, job: Job, ranks: Ranks
) -> tuple[PackedBatches | RowBatches, dict[str, Any]]:
    """Where the batches come from, and what is known of the corpus: from packed rows, or from texts packed here."""
    size, seed, seen = stage.train.batch_size, job.rng_seed("order"), stage.steps * stage.train.batch_size
    if any(isinstance(source, Tokens) for source in sources):
        rows = _rows(sources, stage, job.open(stage.tokenizer))
        known = {"text_bytes": rows.index["text_bytes"], "corpus_tokens": rows.index["tokens"]}
        return RowBatches(rows, size, seed), {**known, "epochs": seen / len(rows)}
    packed = _pack(sources, tokenizer, job, ranks)
    known = {"text_bytes": packed.text_bytes, "corpus_tokens": len(packed)}
    return PackedBatches(packed, stage.seq_len, size, seed), {
        **known,
        "epochs": seen * (stage.seq_len - 1) / len(packed),
    }


def _rows(sources: list[Artifact], stage: Pretrain, tokenizer: Artifact) -> TokenRows:
    """The packed rows, where they fit the stage: one folder, of its row length, made with its tokenizer."""
    if len(sources) > 1:
        raise FledgeError(
            Problem(
                t("packed tokens stand alone as the data of a training"),
                where="data",
                fix=t("pack all of the text together, with data.mix before it where shares matter"),
            )
        )
    rows = TokenRows.open(sources[0].path)
    if rows.seq_len != stage.seq_len:
        raise FledgeError(
            Problem(t("the packed rows have another length"), where="seq_len", found=str(stage.seq_len),
                    allowed=str(rows.seq_len))
        )  # fmt: skip
    if rows.index["tokenizer"] != sha256_of(tokenizer.path / "tokenizer.json"):
        raise FledgeError(
            Problem(t("the rows were packed with another tokenizer"), where="tokenizer", found=str(tokenizer.path))
        )
    return rows


def _pack(sources: list[Artifact], tokenizer: Any, job: Job, ranks: Ranks) -> TokenShards:
    """Token ids of all texts in the work folder, made by the first process, once."""
    folder: Path = job.work / "tokens"
    if ranks.first and not TokenShards.complete(folder):
        job.events.message(t("turning the text into tokens"))
        pack_texts(_told(_texts(sources), job), tokenizer, folder, separator_id(tokenizer))
    ranks.wait()
    packed = TokenShards.open(folder)
    if not len(packed):
        raise FledgeError(Problem(t("there is no text to train on"), where="data"))
    return packed


def _told(texts: Iterable[str], job: Job) -> Iterator[str]:
    for count, text in enumerate(texts, 1):
        job.events.progress(count, None, "texts")
        yield text


def _mean_bits(model: Any, tokenizer: Any, held_out: dict[str, list[str]], dtype: str) -> float:
    """Bits per byte, the mean over languages."""
    found = _measure(model, tokenizer, held_out, "bits", dtype)
    return sum(found.values()) / len(found)


def _measure(model: Any, tokenizer: Any, held_out: dict[str, list[str]], name: str, dtype: str) -> dict[str, float]:
    return {
        f"{name}_{code}": bits_per_byte(model, tokenizer, texts, dtype=dtype).value for code, texts in held_out.items()
    }
