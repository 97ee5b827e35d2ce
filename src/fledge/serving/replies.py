"""OpenAI's replies: whole objects and the chunks of a stream, for chats and for plain completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fledge.inference.engine import Delta, Engine, TokenLogprob
from fledge.serving.tokens import TokenOptions, prompt_rows


class Reply:
    """What all chunks of one reply share. The two endpoints differ in `part` (a delta) and `whole` (an answer)."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(
        self, model: str, engine: Engine, include_usage: bool = False, tokens: TokenOptions | None = None
    ) -> None:
        self.model, self.engine, self.include_usage = model, engine, include_usage
        self.tokens = tokens or TokenOptions()
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices} | more

    def chunk(self, choice: dict[str, Any]) -> str:
        """One event of the stream."""
        more = {"usage": None} if self.include_usage else {}
        return event(self._object(self.chunk_kind, [choice], **more))

    def usage_chunk(self, prompt: int, completion: int) -> str:
        """The event with the numbers of tokens."""
        return event(self._object(self.chunk_kind, [], usage=usage(prompt, completion)))

    def complete(
        self, choices: Sequence[Sequence[Delta]], prompt: int, completion: int,
        read: Sequence[Sequence[TokenLogprob | None]] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """The reply in one piece, from all deltas of every answer; `read` are the log-probabilities of the prompts."""
        wholes = [self.whole(index, deltas) for index, deltas in enumerate(choices)]
        if self.tokens.prompt_logprobs is not None:
            wholes = [whole | {"prompt_logprobs": prompt_rows(rows)} for whole, rows in zip(wholes, read, strict=True)]
        return self._object(self.kind, wholes, usage=usage(prompt, completion))

    def first(self, index: int) -> dict[str, Any] | None:
        """What opens an answer in a stream."""
        return None

    def part(self, index: int, delta: Delta) -> dict[str, Any]:
        """A delta as a choice of a chunk."""
        raise TypeError(type(self))

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """An answer as a choice of the reply."""
        raise TypeError(type(self))

    def spell(self, id: int) -> str:
        """A token as text; control tokens are spelled out, parts of a character show as U+FFFD."""
        if self.tokens.return_tokens_as_token_ids:
            return f"token_id:{id}"
        return self.engine.decode([id], special=True)


class ChatReply(Reply):
    """`chat.completion` and its chunks."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def part(self, index: int, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
        return {
            "index": index,
            "delta": content,
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        } | self.tokens.ids([delta])

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs([p for delta in deltas for p in delta.logprobs]),
            "finish_reason": deltas[-1].finish_reason,
        } | self.tokens.ids(deltas)

    def _logprobs(self, items: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not items:
            return None
        rows = [
            self._token(p.id, p.logprob) | {"top_logprobs": [self._token(id, value) for id, value in p.top]}
            for p in items
        ]
        return {"content": rows, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        text = self.spell(id)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class TextReply(Reply):
    """`text_completion`, whole or in chunks."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self, model: str, engine: Engine, include_usage: bool = False, tokens: TokenOptions | None = None
    ) -> None:
        super().__init__(model, engine, include_usage, tokens)
        self.echoes: Sequence[Echo] = ()
        """what stands before each answer, where the prompt is to be part of the text"""
        self._offsets: dict[int, int] = {}
        self._read: Sequence[Sequence[TokenLogprob | None]] = ()

    def complete(
        self, choices: Sequence[Sequence[Delta]], prompt: int, completion: int,
        read: Sequence[Sequence[TokenLogprob | None]] = (),
    ) -> dict[str, Any]:  # fmt: skip
        self._read = read
        return super().complete(choices, prompt, completion, read)

    def part(self, index: int, delta: Delta) -> dict[str, Any]:
        text = delta.text if index in self._offsets or not self.echoes else self.echoes[index].text + delta.text
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(text)
        logprobs = self._logprobs(delta.logprobs, offset + len(text) - len(delta.text))
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        return choice | self.tokens.ids([delta])

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        logprobs = self._logprobs([p for delta in deltas for p in delta.logprobs], 0)
        if self.echoes:
            text, logprobs = self.echoes[index].before(self, text, logprobs, self._read[index])
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": deltas[-1].finish_reason}
        return choice | self.tokens.ids(deltas)

    def _logprobs(self, items: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not items:
            return None
        tokens = [self.spell(p.id) for p in items]
        return {
            "tokens": tokens,
            "token_logprobs": [p.logprob for p in items],
            "top_logprobs": [{self.spell(id): value for id, value in p.top} for p in items],
            "text_offset": [offset + sum(map(len, tokens[:n])) for n in range(len(tokens))],
        }


@dataclass(frozen=True)
class Echo:
    """A prompt that is part of its answer's text."""

    text: str
    first: str
    """its first token, of which no log-probability is known"""

    @classmethod
    def of(cls, engine: Engine, prompt: str | list[int]) -> Echo:
        """What stands before the answers to a prompt given as text or as token ids."""
        if isinstance(prompt, str):
            return cls(prompt, engine.decode(engine.encode(prompt)[:1], special=True))
        return cls(engine.decode(prompt, special=True), engine.decode(prompt[:1], special=True))

    def before(
        self, reply: TextReply, text: str, logprobs: dict[str, Any] | None, read: Sequence[TokenLogprob | None]
    ) -> tuple[str, dict[str, Any] | None]:
        """The text and its log-probabilities (None: not asked for) with the prompt and its `read` in front."""
        if logprobs is not None and read:
            rows = [item for item in read if item is not None]
            # A tokenizer that begins every text with a token of its own has that one first.
            first = "" if "".join(reply.spell(row.id) for row in rows) == self.text else self.first
            known = reply._logprobs(rows, len(first)) or {}
            unknown = {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
            shifted = logprobs | {"text_offset": [len(self.text) + place for place in logprobs["text_offset"]]}
            logprobs = {key: [unknown[key], *known.get(key, []), *shifted[key]] for key in unknown}
        return self.text + text, logprobs


def usage(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's account of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
