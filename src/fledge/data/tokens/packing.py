"""Token ids on disk: every document once, one separator before each, read through memory maps.

A folder holds `tokens.bin` (uint16 where the vocabulary allows, else uint32, little-endian), `starts.bin`
(uint64, where each document's separator stands, and the total at the end) and `index.json`, written last:
without it the folder is not there. The separator (the end-of-text token) stands *before* each document. It does two
things at once: it ends the document before it, and it is the one token of context from which the first token of
its own document is predicted. A packed stream therefore needs no further mark, and no token goes unlearned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.core.artifact import write_atomic

INDEX = "index.json"


@dataclass(frozen=True)
class TokenShards:
    """Packed documents. `tokens[starts[d]]` is document d's separator; `starts[-1]` is the number of tokens."""

    folder: Path
    tokens: NDArray[Any]  # (N,) uint16 or uint32, memory-mapped
    starts: NDArray[np.int64]  # (D + 1,)
    separator: int
    text_bytes: int
    """UTF-8 bytes of the text behind the tokens, where the packer was told: for bits per byte"""

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    def __len__(self) -> int:
        """Tokens, separators included."""
        return int(self.starts[-1])

    def document(self, index: int) -> NDArray[np.int64]:
        """The ids of one document, without its separator."""
        return np.asarray(self.tokens[self.starts[index] + 1 : self.starts[index + 1]], dtype=np.int64)

    @classmethod
    def open(cls, folder: Path) -> TokenShards:
        """What `pack` wrote. Raises FileNotFoundError when the folder is not complete."""
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        tokens = _map(folder / "tokens.bin", index["dtype"], index["tokens"])
        starts = np.fromfile(folder / "starts.bin", dtype="<u8").astype(np.int64)
        if len(starts) != index["documents"] + 1 or starts[-1] != index["tokens"]:
            raise FileNotFoundError(f"{folder} is not complete")
        return cls(folder, tokens, starts, index["separator"], index["text_bytes"])

    @classmethod
    def complete(cls, folder: Path) -> bool:
        """Whether `pack` ended there."""
        return (folder / INDEX).is_file()


def _map(file: Path, dtype: str, count: int) -> NDArray[Any]:
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype=dtype)


def pack(
    rows: Iterable[Sequence[int]],
    folder: Path,
    separator: int,
    vocab_size: int,
    text_bytes: Callable[[], int] = lambda: 0,
) -> TokenShards:
    """Write documents, given as token ids, to `folder`. Documents without a token are left out.

    `text_bytes` is asked at the end for the bytes of text behind the rows. Raises ValueError when an id does not
    fit the vocabulary.
    """
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    starts, total = [0], 0
    with (folder / "tokens.bin").open("wb") as stream:
        for row in rows:
            if not len(row):
                continue
            ids = np.empty(len(row) + 1, dtype=np.int64)
            ids[0], ids[1:] = separator, row
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(f"token id {int(ids.max())} does not fit a vocabulary of {vocab_size}")
            stream.write(ids.astype(dtype).tobytes())
            total += len(ids)
            starts.append(total)
        stream.flush()
        os.fsync(stream.fileno())
    np.asarray(starts, dtype="<u8").tofile(folder / "starts.bin")
    index = {
        "dtype": dtype.str, "tokens": total, "documents": len(starts) - 1, "separator": separator,
        "text_bytes": text_bytes(),
    }  # fmt: skip
    write_atomic(folder / INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
    return TokenShards.open(folder)


def pack_texts(texts: Iterable[str], tokenizer: Any, folder: Path, separator: int) -> TokenShards:
    """Encode texts as plain text (see `encode_plain`) and pack them."""
    counted = 0

    def count() -> Iterator[str]:
        nonlocal counted
        for text in texts:
            counted += len(text.encode())
            yield text

    size = len(tokenizer) if hasattr(tokenizer, "backend_tokenizer") else tokenizer.get_vocab_size()
    return pack(encode_plain(tokenizer, count()), folder, separator, size, lambda: counted)


def encode_plain(tokenizer: Any, texts: Iterable[str], batch: int = 256) -> Iterator[list[int]]:
    """Token ids of each text, nothing added, and no spelling of a control token taken for one.

    `tokenizer` is a `tokenizers.Tokenizer` or a fast tokenizer of transformers; it is left as it was.
    """
    yield from encode_all(plain(tokenizer), texts, batch)


def plain(tokenizer: Any) -> Any:
    """A copy of the tokenizer that takes every text as plain text. A large one takes a second to copy."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def encode_all(backend: Any, texts: Iterable[str], batch: int = 256) -> Iterator[list[int]]:
    """Token ids of each text by what `plain` gave."""
    stream = iter(texts)
    while some := list(islice(stream, batch)):
        for encoding in backend.encode_batch_fast(some, add_special_tokens=False):
            yield encoding.ids
