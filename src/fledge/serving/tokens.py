"""Tokens, vectors and probabilities of given text, as vLLM's server spells them: what another engine asks of ours.

    POST /tokenize      {"prompt"} or {"messages"}      → {"tokens", "count", "max_model_len"}
    POST /detokenize    {"tokens"}                      → {"prompt"}
    POST /v1/embeddings {"input"}                       → OpenAI's list of vectors

and in completions `return_token_ids`, `return_tokens_as_token_ids`, `ignore_eos`, `stop_token_ids`, `prompt_logprobs`.
"""

from __future__ import annotations

import asyncio
import base64
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import Delta, Engine, Request, TokenLogprob
from fledge.inference.engines.errors import CannotDo
from fledge.inference.options import ChatMessage
from fledge.serving.service import Service

_MOST = 2048
"""texts in one request for vectors, as OpenAI has it"""


class TokenOptions(BaseModel):
    """Options of both endpoints that speak of token ids; their names are vLLM's."""

    return_token_ids: bool = Field(False, description="the ids of the tokens stand beside the text")
    return_tokens_as_token_ids: bool = Field(False, description='log-probabilities name tokens as "token_id:7"')
    ignore_eos: bool = Field(False, description="the model's own end of text does not end the answer")
    stop_token_ids: list[int] | None = Field(None, description="token ids that end it instead; with ignore_eos: true")
    prompt_logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities of the prompt's tokens")

    def token_fields(self, stream: bool) -> dict[str, Any]:
        """Fields of the engine's request. Raises FledgeError for what does not go together."""
        if self.stop_token_ids is not None and not self.ignore_eos:
            raise FledgeError(Problem(t("stop_token_ids needs ignore_eos: true"), "stop_token_ids"))
        if self.prompt_logprobs is not None and stream:
            raise FledgeError(Problem(t("prompt_logprobs cannot be streamed"), "prompt_logprobs"))
        stop_ids = tuple(self.stop_token_ids or ()) if self.ignore_eos else None
        return {"stop_ids": stop_ids, "prompt_logprobs": self.prompt_logprobs}

    def ids(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """What a choice says of its token ids."""
        return {"token_ids": [id for delta in deltas for id in delta.token_ids]} if self.return_token_ids else {}


def prompt_rows(read: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """The log-probabilities of a prompt as vLLM has them: {id: {"logprob", "rank"}}, the prompt's own token first."""
    rows: list[dict[str, Any] | None] = []
    for item in read:
        if item is None:
            rows.append(None)
            continue
        ranks = {id: rank for rank, (id, _) in enumerate(item.top, start=1)}
        values = {item.id: item.logprob, **dict(item.top)}
        rows.append({str(id): {"logprob": value, "rank": ranks.get(id)} for id, value in values.items()})
    return rows


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model: str | None = None


class TokenizeRequest(_Body):
    """POST /tokenize. Of a conversation, and of a text with what the tokenizer puts around it, only the number of
    tokens is told."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = False


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    skip_special_tokens: bool = False


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    user: str | None = None


def add_token_routes(app: FastAPI, service: Service) -> None:
    """The addresses of this page."""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        _, engine = service.engine(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise FledgeError(Problem(t("give one of prompt and messages"), "prompt"))
        if body.messages is None and not body.add_special_tokens:
            ids = await asyncio.to_thread(engine.encode, body.prompt or "")
            return {"count": len(ids), "max_model_len": engine.context, "tokens": ids}
        turns = body.messages and tuple(message.to_message() for message in body.messages)
        number = await asyncio.to_thread(engine.count, Request(messages=turns, text=body.prompt))
        return {"count": number, "max_model_len": engine.context, "tokens": None}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        _, engine = service.engine(body.model)
        return {"prompt": await asyncio.to_thread(engine.decode, body.tokens, not body.skip_special_tokens)}

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        name, engine = service.engine(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not 1 <= len(texts) <= _MOST:
            raise FledgeError(Problem(t("there are no texts, or too many"), "input", str(len(texts)), f"1 … {_MOST}"))
        vectors = await asyncio.to_thread(engine.embed, texts)
        read = await asyncio.to_thread(_tokens, engine, texts)
        rows = [
            {"object": "embedding", "index": index, "embedding": _spelled(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": read, "total_tokens": read}
        return {"object": "list", "data": rows, "model": name, "usage": usage}


def _tokens(engine: Engine, texts: Sequence[str]) -> int:
    try:
        return sum(len(engine.encode(text)) for text in texts)
    except CannotDo:  # a server that counts no tokens
        return 0


def _spelled(vector: list[float], encoding: str) -> list[float] | str:
    return base64.b64encode(array("f", vector).tobytes()).decode() if encoding == "base64" else vector
