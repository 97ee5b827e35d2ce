"""The text of a pre-training: read from records, or packed rows as they are, and excerpts of what is held out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact, Tokens, write_atomic
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.data.tokens.batches import PackedBatches
from fledge.data.tokens.packer import identity_of
from fledge.data.tokens.packing import TokenShards, pack_texts
from fledge.data.tokens.rows import RowBatches, TokenRows
from fledge.records import shards
from fledge.records.kinds import Document
from fledge.training.held_out import separator_id
from fledge.training.layout.ranks import Ranks
from fledge.training.strategies.replay import Replayed, replayed
from fledge.training.strategies.settings import Replay


def rows_of(
    sources: Sequence[Artifact],
    vocabulary: Path,
    tokenizer: Any,
    seq_len: int,
    batch_size: int,
    job: Job,
    ranks: Ranks,
    name: str = "tokens",
    called: Sequence[str] = (),
) -> tuple[PackedBatches | RowBatches, dict[str, Any]]:
    """Batches of rows of `seq_len` tokens, and what is known of the corpus: from packed rows, or from texts that are
    packed here, in the folder `name` of the work folder. `vocabulary` is the folder of the tokenizer. Where several
    sources are `called` something, batches say of every token where it comes from."""
    seed = job.rng_seed("order")
    if any(isinstance(source, Tokens) for source in sources):
        rows = _packed_rows(sources, seq_len, vocabulary)
        known = {"text_bytes": rows.index["text_bytes"], "corpus_tokens": rows.index["tokens"]}
        return RowBatches(rows, batch_size, seed), known
    counted = Counted(sources)
    packed = packed_here(counted, tokenizer, job, ranks, name)
    known = {"text_bytes": packed.text_bytes, "corpus_tokens": len(packed)}
    if len(set(called)) < 2:
        return PackedBatches(packed, seq_len, batch_size, seed), known
    origin = dict(zip(called, counted.kept(job.work / f"{name}.json", ranks), strict=True))
    return PackedBatches(packed, seq_len, batch_size, seed, origin), known


class Counted:
    """The texts of several sources, one after another, and how many each has."""

    def __init__(self, sources: Sequence[Artifact]) -> None:
        self.sources, self.counts = sources, [0] * len(sources)

    def __iter__(self) -> Iterator[str]:
        for number, source in enumerate(self.sources):
            for text in texts_of([source]):
                self.counts[number] += 1
                yield text

    def kept(self, file: Path, ranks: Ranks) -> list[int]:
        """The counts; of texts that an earlier attempt or another process read, from `file`."""
        if ranks.first and any(self.counts):
            write_atomic(file, json.dumps(self.counts))
        elif ranks.first and not file.exists():
            write_atomic(file, json.dumps([sum(1 for _ in texts_of([source])) for source in self.sources]))
        ranks.wait()
        found: list[int] = json.loads(file.read_text(encoding="utf-8"))
        return found


def rows_with_replay(
    sources: Sequence[Artifact],
    replay: Replay,
    vocabulary: Path,
    tokenizer: Any,
    seq_len: int,
    batch_size: int,
    job: Job,
    ranks: Ranks,
    seen: int,
) -> tuple[Replayed, dict[str, Any]]:
    """The same with rows of earlier corpora among them; of `seen` rows in all, `epochs` are those over the new text."""
    new, known = rows_of(sources, vocabulary, tokenizer, seq_len, 1, job, ranks)
    old = [
        rows_of([job.open(ref)], vocabulary, tokenizer, seq_len, 1, job, ranks, f"replayed/{number}")[0]
        for number, ref in enumerate(replay.data)
    ]
    known["epochs"] = epochs(new, round(seen * (1 - replay.share)))
    return replayed(new, old, replay, batch_size), known


def epochs(rows: PackedBatches | RowBatches, seen: int) -> float:
    """How often `seen` rows go over the corpus."""
    if isinstance(rows, RowBatches):
        return seen / len(rows.rows)
    return seen * (rows.seq_len - 1) / len(rows.shards)


def packed_here(texts: Iterable[str], tokenizer: Any, job: Job, ranks: Ranks, name: str) -> TokenShards:
    """Token ids of texts in the work folder, made by the first process, once."""
    folder: Path = job.work / name
    if ranks.first and not TokenShards.complete(folder):
        job.events.message(t("turning the text into tokens"))
        pack_texts(_told(texts, job), tokenizer, folder, separator_id(tokenizer))
    ranks.wait()
    packed = TokenShards.open(folder)
    if not len(packed):
        raise FledgeError(Problem(t("there is no text to train on"), where="data"))
    return packed


def excerpt(source: Artifact, size: int, language: str = "") -> list[str]:
    """The first texts of `source`, `size` bytes in all; the last one is cut between two characters.

    With a language, texts known to be in another one are passed over.
    """
    found, left = [], size
    for text in texts_of([source], language):
        text = text.encode()[:left].decode(errors="ignore")
        if not text:
            break
        found.append(text)
        left -= len(text.encode())
    if not found:
        raise FledgeError(Problem(t("there is no held-out text"), where=str(source.path)))
    return found


def texts_of(sources: Iterable[Artifact], language: str = "") -> Iterator[str]:
    """Every text of some records."""
    for source in sources:
        for record in shards.read(source, "documents"):
            assert isinstance(record, Document)
            if record.text and (not language or record.language in ("", language)):
                yield record.text


def _packed_rows(sources: Sequence[Artifact], seq_len: int, vocabulary: Path) -> TokenRows:
    """The packed rows, where they fit: one folder, of this row length, made with this tokenizer."""
    if len(sources) > 1:
        raise FledgeError(
            Problem(
                t("packed tokens stand alone as the data of a training"),
                where="data",
                fix=t("pack all of the text together, with data.mix before it where shares matter"),
            )
        )
    rows = TokenRows.open(sources[0].path)
    if rows.seq_len != seq_len:
        raise FledgeError(
            Problem(t("the packed rows have another length"), where="data", found=str(rows.seq_len),
                    allowed=str(seq_len))
        )  # fmt: skip
    if rows.index["tokenizer"] != identity_of(vocabulary):
        raise FledgeError(
            Problem(t("the rows were packed with another tokenizer"), where="tokenizer", found=str(vocabulary))
        )
    return rows


def _told(texts: Iterable[str], job: Job) -> Iterator[str]:
    for count, text in enumerate(texts, 1):
        job.events.progress(count, None, "texts")
        yield text
