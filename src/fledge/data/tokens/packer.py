"""Documents into packed rows (`rows`), in as many processes as there are, going on where a killed run stopped.

Two passes of independent work: every row group of the corpus is encoded; then runs of row groups that together hold
`shard` tokens are each packed into one shard. Neither depends on the number of processes.

`best_fit` (Ding et al., 2024, "Fewer truncations improve language modeling"): a document longer than a row is cut into
whole rows and a rest; then all pieces, the longest first, go each to the fullest row that still has room. Only what is
longer than a row is ever cut. `concatenate` puts the documents one behind the other and cuts wherever a row ends.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fledge.core.artifact import Artifact, digest_of, sha256_of
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.workers import spread
from fledge.data.inputs import Rows, keep, made_once, rows_of, set_aside
from fledge.data.tokens.batches import Ids
from fledge.data.tokens.packing import encode_all, plain
from fledge.data.tokens.rows import TOKENS, write_index
from fledge.records.kinds import Conversation, as_document, from_row

Strategy = Literal["best_fit", "concatenate"]
_AT_ONCE = 2**22  # tokens gathered in one go


@dataclass(frozen=True)
class Encoding:
    """One row group to encode."""

    rows: Rows
    kind: str
    tokenizer: Path
    separator: int
    folder: Path


@dataclass(frozen=True)
class Packing:
    """Encoded row groups to pack into one shard."""

    parts: tuple[Path, ...]
    seq_len: int
    strategy: Strategy
    dtype: str
    separator: int
    folder: Path


@dataclass(frozen=True)
class Cut:
    """Documents cut into pieces and the pieces laid into rows. Pieces are in the order of rows, then of places."""

    starts: Ids  # (P,) where in the stream of documents each piece begins
    lengths: Ids  # (P,)
    rows: Ids  # (P,) which row it lies in, rising
    cut: int  # documents cut although a row would have held them
    long: int  # documents longer than a row


def pack(
    data: Sequence[Artifact], tokenizer: Path, seq_len: int, strategy: Strategy, shard: int, job: Job
) -> dict[str, Any]:
    """Pack the texts of `data` into rows below `job.out`, in shards of about `shard` tokens. Returns the metrics."""
    separator, size = separator_of(tokenizer), load(tokenizer).get_vocab_size()
    dtype = "<u2" if size <= 2**16 else "<u4"
    works = _encodings(data, tokenizer, separator, job)
    _do(encode, works, job, 0.0, 0.7)
    notes = [encode(work) for work in works]  # all are there: read in order
    if not sum(note["documents"] for note in notes):
        raise FledgeError(Problem(t("there is no text to train on"), where="data"))
    groups = [
        Packing(tuple(parts), seq_len, strategy, dtype, separator, job.work / "shards" / f"{number:06d}")
        for number, parts in enumerate(_grouped([w.folder for w in works], [n["tokens"] for n in notes], shard))
    ]
    _do(pack_shard, groups, job, 0.7, 1.0)
    shards = []
    for number, group in enumerate(groups):
        shards.append({"name": f"part-{number:05d}", **pack_shard(group)})
        for ending in ("bin", "begins"):
            keep(group.folder / f"rows.{ending}", job.out / TOKENS / f"part-{number:05d}.{ending}")
    total = {key: sum(shard[key] for shard in shards) for key in ("rows", "tokens", "pieces", "context", "cut", "long")}
    facts = {
        "format": 1, "seq_len": seq_len, "dtype": dtype, "vocab_size": size, "separator": separator,
        "strategy": strategy, "tokenizer": identity_of(tokenizer),
        "documents": sum(note["documents"] for note in notes), "text_bytes": sum(note["bytes"] for note in notes),
        "rows": total["rows"], "tokens": total["tokens"],
    }  # fmt: skip
    write_index(job.out, [{key: s[key] for key in ("name", "rows", "tokens", "sha256")} for s in shards], facts)
    rejected = set_aside((job.work / f"raw-{number}" for number in range(len(data))), job.out)
    return {
        "rows": total["rows"], "tokens": total["tokens"], "bytes": facts["text_bytes"],
        "documents": facts["documents"], "documents_cut": total["cut"], "documents_longer_than_a_row": total["long"],
        "share_cut": total["cut"] / facts["documents"], "pieces": total["pieces"], "context_tokens": total["context"],
        "fill": total["tokens"] / (total["rows"] * seq_len), "shards": len(shards), "seq_len": seq_len,
        "rejected": rejected,
    }  # fmt: skip


def _encodings(data: Sequence[Artifact], tokenizer: Path, separator: int, job: Job) -> list[Encoding]:
    works: list[Encoding] = []
    for number, artifact in enumerate(data):
        kind, chunks = rows_of(artifact, job.work / f"raw-{number}", job.events.progress)
        if kind not in ("documents", "conversations"):
            raise FledgeError(
                Problem(t("only documents and conversations can be packed"), str(artifact.path), found=kind)
            )
        for chunk in chunks:
            works.append(Encoding(chunk, kind, tokenizer, separator, job.work / "ids" / f"{len(works):06d}"))
    return works


def _do(work: Any, items: Sequence[Any], job: Job, start: float, stop: float) -> None:
    for number, _ in enumerate(spread(work, items, job.execution), 1):
        job.events.progress(start + (stop - start) * number / len(items), 1.0, "share")


def _grouped(folders: Sequence[Path], tokens: Sequence[int], limit: int) -> Iterator[list[Path]]:
    """Runs of neighbours with at most `limit` tokens together (or a single one)."""
    group: list[Path] = []
    held = 0
    for folder, count in zip(folders, tokens, strict=True):
        if group and held + count > limit:
            yield group
            group, held = [], 0
        group.append(folder)
        held += count
    if group:
        yield group


# --- encoding --------------------------------------------------------------------------------------------------------


def encode(work: Encoding) -> dict[str, Any]:
    """Encode one row group, unless it is done: `ids.bin` (uint32) and `lengths.bin` (uint32), separators included."""

    def make(folder: Path) -> dict[str, Any]:
        table = work.rows.read(work.kind)
        if work.kind == "documents":
            texts = [text for text in table["text"].to_pylist() if text]
        else:
            records = (from_row(work.kind, row) for row in table.to_pylist())
            texts = [as_document(r).text for r in records if isinstance(r, Conversation)]
        lengths, size = [], 0
        with (folder / "ids.bin").open("wb") as stream, one_thread():
            for ids, text in zip(encode_all(plain_of(work.tokenizer), texts), texts, strict=True):
                if ids:
                    stream.write(np.array([work.separator, *ids, work.separator], dtype="<u4").tobytes())
                    lengths.append(len(ids) + 2)
                    size += len(text.encode())
        np.array(lengths, dtype="<u4").tofile(folder / "lengths.bin")
        return {"documents": len(lengths), "tokens": sum(lengths), "bytes": size}

    return made_once(work.folder, make)


@contextmanager
def one_thread() -> Iterator[None]:
    """The `tokenizers` library without threads of its own: the processes are the parallelism."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@lru_cache(maxsize=2)
def load(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder; torch and transformers stay out of the worker processes."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@lru_cache(maxsize=2)
def plain_of(folder: Path) -> Any:
    """The tokenizer of a folder for plain text (see `packing.plain`), made once a process."""
    return plain(load(folder))


def identity_of(folder: Path) -> str:
    """A digest of what decides a tokenizer's ids. What stands around a text is left out: transformers writes that part
    of `tokenizer.json` otherwise when it saves the tokenizer again, beside a model."""
    said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return digest_of({key: said[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")})


def separator_of(folder: Path) -> int:
    """The token that stands around a text: end-of-text where there is one, else the folder's bos, eos or sep."""
    vocabulary = load(folder).get_vocab()
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = (config.get(key) for key in ("bos_token", "eos_token", "sep_token"))
    names = ["<|endoftext|>", "<|end_of_text|>", *(n["content"] if isinstance(n, dict) else n for n in named if n)]
    found = next((vocabulary[name] for name in names if name in vocabulary), None)
    if found is None:
        raise FledgeError(
            Problem(t("the tokenizer has no token that ends a text"), where=str(folder), allowed=", ".join(names[:2]))
        )
    return int(found)


# --- packing ---------------------------------------------------------------------------------------------------------


def pack_shard(work: Packing) -> dict[str, Any]:
    """Pack some encoded row groups, unless it is done: `rows.bin` and `rows.begins`."""

    def make(folder: Path) -> dict[str, Any]:
        stream = np.concatenate([np.fromfile(part / "ids.bin", dtype="<u4").astype(work.dtype) for part in work.parts])
        lengths = np.concatenate([np.fromfile(part / "lengths.bin", dtype="<u4") for part in work.parts])
        laid = (best_fit if work.strategy == "best_fit" else concatenate)(lengths.astype(np.int64), work.seq_len)
        rows = int(laid.rows[-1]) + 1 if len(laid.rows) else 0
        with (folder / "rows.bin").open("wb") as tokens, (folder / "rows.begins").open("wb") as begins:
            for ids, bits in _filled(stream, laid, rows, work.seq_len, work.separator):
                tokens.write(ids.tobytes())
                begins.write(bits.tobytes())
        used = int(laid.lengths.sum())
        digests = {ending: sha256_of(folder / f"rows.{ending}") for ending in ("bin", "begins")}
        return {
            "rows": rows, "tokens": used, "pieces": len(laid.starts), "context": used - len(stream),
            "cut": laid.cut, "long": laid.long, "sha256": digests,
        }  # fmt: skip

    return made_once(work.folder, make)


def _filled(
    stream: NDArray[Any], laid: Cut, rows: int, seq_len: int, separator: int
) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]:
    """Blocks of rows: ids (R, T), and packed bits that say where pieces begin."""
    before = np.concatenate([[0], np.cumsum(laid.lengths)])
    first = np.searchsorted(laid.rows, np.arange(rows + 1))  # the first piece of each row
    for start in range(0, rows, step := max(1, _AT_ONCE // seq_len)):
        stop = min(start + step, rows)
        pieces = slice(first[start], first[stop])
        lengths = laid.lengths[pieces]
        in_row = before[pieces] - before[first[laid.rows[pieces]]]
        to = (laid.rows[pieces] - start) * seq_len + in_row
        count = np.arange(lengths.sum()) - np.repeat(before[pieces] - before[first[start]], lengths)
        ids = np.full((stop - start) * seq_len, separator, dtype=stream.dtype)
        begins = np.ones((stop - start) * seq_len, dtype=np.bool_)
        places = np.repeat(to, lengths) + count
        ids[places] = stream[np.repeat(laid.starts[pieces], lengths) + count]
        begins[places] = count == 0
        bits = np.packbits(begins.reshape(-1, seq_len), axis=1, bitorder="little")
        yield ids.reshape(-1, seq_len), bits


def best_fit(documents: Ids, seq_len: int) -> Cut:
    """Best-fit-decreasing packing of documents of these lengths (≥ 3 tokens each) into rows of `seq_len`."""
    count = np.maximum(1, -(-(documents - 1) // (seq_len - 1)))  # a piece begins with the last token of the one before
    owner = np.repeat(np.arange(len(documents)), count)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    starts = (np.cumsum(documents) - documents)[owner] + number * (seq_len - 1)
    lengths = np.minimum(seq_len, documents[owner] - number * (seq_len - 1))
    order = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(order), dtype=np.int64)
    rows[order] = fullest_row_first(lengths[order], seq_len)
    order = order[np.argsort(rows[order], kind="stable")]
    return Cut(starts[order], lengths[order], rows[order], 0, int(np.count_nonzero(documents > seq_len)))


def fullest_row_first(lengths: Ids, size: int) -> Ids:
    """The row of every piece (lengths falling): the one with the least room left that still holds it, else a new one.

    Pieces of one length are placed together: the fullest row with room for one takes all that it has room for, since
    it stays the fullest. There are few different lengths and rooms, so the time hardly depends on the number of pieces.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    waiting: dict[int, deque[Ids]] = defaultdict(deque)  # room left → rows, in blocks
    rooms: list[int] = []  # the keys that have rows, sorted
    made = at = 0
    while at < len(lengths):
        length = int(lengths[at])
        end = at + int(np.searchsorted(-lengths[at:], -length, side="right"))
        while at < end:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms[place]
                block = waiting[room].popleft()
            else:
                room, block = size, np.arange(made, made + -(-(end - at) // (size // length)))
                made += len(block)
            each = room // length
            used = block[: -(-(end - at) // each)]
            if len(used) < len(block):
                waiting[room].appendleft(block[len(used) :])
            elif room < size and not waiting[room]:
                rooms.pop(place)
            placed = min(end - at, each * len(used))
            rows[at : at + placed] = np.repeat(used, each)[:placed]
            last = placed - each * (len(used) - 1)  # the last row may get fewer
            for some, left in ((used[:-1], room - each * length), (used[-1:], room - last * length)):
                if len(some) and left > 1:
                    if not waiting[left]:
                        insort(rooms, left)
                    waiting[left].append(some)
            at += placed
    return rows


def concatenate(documents: Ids, seq_len: int) -> Cut:
    """Documents one behind the other, cut wherever a row ends; a row that begins inside one repeats a token of it."""
    starts, lengths, rows = [], [], []
    row, room, cut, at = 0, seq_len, 0, 0
    for length in documents.tolist():
        if room < 2:  # not even one token and what predicts it
            row, room = row + 1, seq_len
        cut += room < length <= seq_len
        left, start = length, at
        while True:
            taken = min(left, room)
            starts.append(start)
            lengths.append(taken)
            rows.append(row)
            room -= taken
            if taken == left:
                break
            left, start = left - taken + 1, start + taken - 1
            row, room = row + 1, seq_len
        at += length
    made = [np.array(values, dtype=np.int64) for values in (starts, lengths, rows)]
    return Cut(*made, int(cut), int(np.count_nonzero(documents > seq_len)))
