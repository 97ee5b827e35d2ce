"""Models that read and do not write: encoders (BERT and its kin) and bodies without a head, as `train.embed` makes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.tokens.packing import plain
from fledge.inference import scoring
from fledge.inference.devices import device_of, dtype_for
from fledge.inference.engine import Delta, Handle, Listen, Request, Result, Scored
from fledge.inference.pooling import Pooling, pooling_of
from fledge.models.load import context_of
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation

T = TypeVar("T")


class EmbeddingEngine:
    """An `Engine` for `embed` alone: every other request is refused with the reason."""

    renderer: ChatRenderer | None = None

    def __init__(
        self, model: Any, tokenizer: Any, pooling: Pooling | None = None, *, context: int | None = None
    ) -> None:
        """`model`: with or without a head. `context`: the longest text, in tokens."""
        self.model, self.tokenizer, self.pooling = model.eval(), tokenizer, pooling or Pooling()
        limit = context_of(model.config)
        self.context = min(context or limit, limit)
        self._body = scoring.body_of(model)
        self._text = plain(tokenizer)  # never changed: threads may share it
        self._lock = threading.Lock()

    @classmethod
    def from_folder(
        cls, path: Path | str, dtype: str = "auto", device: str = "auto", **options: Any
    ) -> EmbeddingEngine:
        """An engine for a model folder; dtype and device as the native engine's, `options` as in the constructor."""
        from fledge.models.load import load_model, load_tokenizer

        folder, device = Path(path), device_of(device)
        model = load_model(folder, dtype=dtype_for(folder, dtype, device), device=device, head="body")
        return cls(model, load_tokenizer(folder), **({"pooling": pooling_of(folder)} | options))

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector a text (fp32), as the folder's pooling says. Raises FledgeError for texts beyond the context."""
        rows = [list(self._text.encode(text).ids) for text in texts]
        return scoring.embed(self._call, self._body, self.context, rows, self.pooling)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: control spellings stay text, no special tokens are added."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; with `special` control tokens are spelled out, else left out."""
        return str(self._text.decode(list(ids), skip_special_tokens=not special))

    def submit(self, request: Request, listen: Listen) -> Handle:
        raise _writes_none()

    def count(self, request: Request) -> int:
        raise _writes_none()

    def stream(self, request: Request) -> Iterator[Delta]:
        raise _writes_none()

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        return [Result(error=_writes_none()) for _ in requests]

    def score(self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[Scored]:
        raise _writes_none()

    def reward(self, conversations: Sequence[Conversation]) -> list[float]:
        raise FledgeError(
            Problem(t("this model is not a reward model"), fix=t("give a folder made by the stage train.reward"))
        )

    def close(self) -> None:
        """Nothing runs on here."""

    def __enter__(self) -> EmbeddingEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @torch.inference_mode()
    def _call(self, function: Callable[[], T]) -> T:
        with self._lock:
            return function()


def _writes_none() -> FledgeError:
    return FledgeError(t("this model makes vectors of texts: it writes none and scores none"))
