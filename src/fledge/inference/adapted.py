"""An engine as one of its adapters: a model of its own name that shares the base's weights, blocks and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fledge.inference.engine import Delta, Handle, Listen, Request, Result, Scored

if TYPE_CHECKING:
    from fledge.inference.native import NativeEngine
    from fledge.records.kinds import Conversation


class AdaptedEngine:
    """An `Engine` whose requests are read by the adapter `name` of another one. Closing it leaves that one open."""

    def __init__(self, engine: NativeEngine, name: str) -> None:
        """Raises FledgeError when the engine has no such adapter."""
        self.base, self.name = engine, name
        self.context, self.tokenizer, self.model = engine.context, engine.tokenizer, engine.model
        self.renderer = engine.adapters[name].renderer or engine.renderer

    def _ours(self, request: Request) -> Request:
        return replace(request, adapter=request.adapter or self.name)

    def submit(self, request: Request, listen: Listen) -> Handle:
        return self.base.submit(self._ours(request), listen)

    def count(self, request: Request) -> int:
        return self.base.count(self._ours(request))

    def stream(self, request: Request) -> Iterator[Delta]:
        return self.base.stream(self._ours(request))

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        return self.base.generate([self._ours(request) for request in requests])

    def score(self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[Scored]:
        return self.base.score(prompt_ids, continuation_ids, adapter=self.name)

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return self.base.embed(texts, adapter=self.name)

    def reward(self, conversations: Sequence[Conversation]) -> list[float]:
        return self.base.reward(conversations)

    def encode(self, text: str) -> list[int]:
        return self.base.encode(text)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        return self.base.decode(ids, special)

    def close(self) -> None:
        """Nothing is held here."""

    def __enter__(self) -> AdaptedEngine:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
