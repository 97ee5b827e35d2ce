"""OpenAI's replies: whole objects and the chunks of a stream, for chats and for plain completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fledge.inference.engine import Delta, Engine, TokenLogprob


class Reply:
    """What all chunks of one reply share. The two endpoints differ in `part` (a delta) and `whole` (an answer)."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, model: str, engine: Engine, include_usage: bool = False) -> None:
        self.model, self.engine, self.include_usage = model, engine, include_usage
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

    def complete(self, choices: Sequence[Sequence[Delta]], prompt: int, completion: int) -> dict[str, Any]:
        """The reply in one piece, from all deltas of every answer."""
        wholes = [self.whole(index, deltas) for index, deltas in enumerate(choices)]
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
        }

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs([p for delta in deltas for p in delta.logprobs]),
            "finish_reason": deltas[-1].finish_reason,
        }

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

    def __init__(self, model: str, engine: Engine, include_usage: bool = False) -> None:
        super().__init__(model, engine, include_usage)
        self._offsets: dict[int, int] = {}

    def part(self, index: int, delta: Delta) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(delta.text)
        logprobs = self._logprobs(delta.logprobs, offset)
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        logprobs = self._logprobs([p for delta in deltas for p in delta.logprobs], 0)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": deltas[-1].finish_reason}

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


def usage(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's account of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
