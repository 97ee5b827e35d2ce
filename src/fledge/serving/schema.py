"""OpenAI's requests, as far as they are understood. What is not understood is refused, never ignored."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import Request
from fledge.inference.options import ChatMessage, SamplingOptions
from fledge.inference.prompting import AnyTechnique
from fledge.serving.tokens import TokenOptions


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class ApiRequest(SamplingOptions, TokenOptions):
    """What both endpoints share. The last group has no effect on the text and is accepted for clients that send it."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def refuse_unsupported(self, **neutral: tuple[Any, ...]) -> None:
        """Raise FledgeError for fields whose value is none of their neutral ones."""
        for name, allowed in neutral.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise FledgeError(Problem(t("{name} is not supported by this server", name=name), name))
        if self.stream_options is not None and not self.stream:
            raise FledgeError(Problem(t("stream_options needs stream: true"), "stream_options"))

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(ApiRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    reasoning_effort: Any = None

    technique: AnyTechnique | None = None
    """a prompting technique by which the question is answered (`serving.techniques`)"""

    def request(self) -> Request:
        """What the engine is asked. Raises FledgeError for what the server cannot do."""
        self.refuse_unsupported(
            tools=([],), tool_choice=("none", "auto"), functions=([],), function_call=("none", "auto"),
            parallel_tool_calls=(True, False), modalities=(["text"],), reasoning_effort=("none",),
        )  # fmt: skip
        if self.top_logprobs is not None and not self.logprobs:
            raise FledgeError(Problem(t("top_logprobs needs logprobs: true"), "top_logprobs"))
        prompt: dict[str, Any] = {"messages": tuple(message.to_message() for message in self.messages)}
        if self.max_completion_tokens is not None:
            prompt["max_new_tokens"] = self.max_completion_tokens
        if self.logprobs:
            prompt["logprobs"] = self.top_logprobs or 0
        return self.to_request(**prompt, **self.token_fields(self.stream))


class CompletionRequest(ApiRequest):
    """POST /v1/completions. Without `max_tokens` it writes 16 tokens, as OpenAI's does."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(16, ge=1)

    echo: bool | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many, as texts or token ids."""
        given: list[Any] = list(self.prompt) if isinstance(self.prompt, list) else [self.prompt]
        return [given] if given and isinstance(given[0], int) else given

    def requests(self) -> list[Request]:
        """What the engine is asked, one request a prompt. Raises FledgeError for what the server cannot do."""
        self.refuse_unsupported(suffix=("",))
        if not 1 <= len(self.prompts) <= 128:
            raise FledgeError(Problem(t("the prompt is empty, or there are too many"), "prompt", allowed="1 … 128"))
        if self.echo and self.logprobs is not None and self.stream:
            raise FledgeError(Problem(t("logprobs of an echoed prompt cannot be streamed"), "echo"))
        shared = {"logprobs": self.logprobs, **self.token_fields(self.stream)}
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            shared["prompt_logprobs"] = self.logprobs
        return [
            self.to_request(**shared, **({"text": p} if isinstance(p, str) else {"prompt_ids": tuple(p)}))
            for p in self.prompts
        ]
