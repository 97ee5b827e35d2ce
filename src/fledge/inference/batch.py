"""A file of prompts, a file of answers: what `fledge generate MODEL < prompts.jsonl` does.

A line in is a JSON object with "prompt" (text) or "messages", and any of `options.SamplingOptions`; "id" is carried
over. A line out, in the same order, has "text" ("texts" for n > 1), "finish_reason" and the numbers of tokens; or
"error" with the line's number. A bad line is reported and counted and stops nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TextIO

from pydantic import ValidationError

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import Engine, Request, Result
from fledge.inference.options import ChatMessage, SamplingOptions, problems_of

_WINDOW = 256
"""lines that are in the engine together; answers are written when all of them are there"""


class Line(SamplingOptions):
    """One line of the input."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    id: str | int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Counts:
    """What became of the lines."""

    lines: int = 0
    answered: int = 0
    failed: int = 0
    tokens: int = 0


def generate_file(
    engine: Engine,
    lines_in: Iterable[str],
    lines_out: TextIO,
    defaults: Mapping[str, Any] | None = None,
    progress: Callable[[Counts], None] = lambda counts: None,
) -> int:
    """Answer every line; the number of lines that could not be. `defaults` are options of lines that do not say."""
    counts = Counts()
    numbered = ((number, line) for number, line in enumerate(lines_in, start=1) if line.strip())
    while window := list(islice(numbered, _WINDOW)):
        for row in _answer(engine, window, defaults or {}):
            lines_out.write(json.dumps(row, ensure_ascii=False) + "\n")
            failed = "error" in row
            counts = Counts(
                counts.lines + 1,
                counts.answered + (not failed),
                counts.failed + failed,
                counts.tokens + row.get("completion_tokens", 0),
            )
        lines_out.flush()
        progress(counts)
    return counts.failed


def _answer(engine: Engine, window: list[tuple[int, str]], defaults: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    read = [_read(number, line, defaults) for number, line in window]
    results = iter(engine.generate([request for _, request in read if isinstance(request, Request)]))
    for (number, _), (head, request) in zip(window, read, strict=True):
        result = next(results) if isinstance(request, Request) else Result(error=request)
        yield head | _row(number, result)


def _read(number: int, line: str, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], Request | FledgeError]:
    """The keys that are carried over, and the request or what is wrong with the line."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, FledgeError(Problem(t("this is not JSON: {message}", message=str(error))))
    if not isinstance(value, dict):
        return {}, FledgeError(Problem(t("a line is a JSON object"), found=type(value).__name__))
    head = {"id": value["id"]} if "id" in value else {}
    try:
        parsed = Line.model_validate({**defaults, **value})
        messages = parsed.messages and tuple(message.to_message() for message in parsed.messages)
        request = parsed.to_request(messages=messages or None, text=parsed.prompt, logprobs=parsed.logprobs)
    except ValidationError as error:
        return head, FledgeError(*problems_of(error, Line))
    except FledgeError as error:
        return head, error
    return head, request


def _row(number: int, result: Result) -> dict[str, Any]:
    if result.error is not None:
        return {"line": number, "error": str(result.error)}
    texts = [choice.text for choice in result.choices]
    row: dict[str, Any] = {"text": texts[0]} if len(texts) == 1 else {"texts": texts}
    row["finish_reason"] = result.choices[0].finish_reason
    row["prompt_tokens"] = result.prompt_tokens
    row["completion_tokens"] = sum(len(choice.token_ids) for choice in result.choices)
    if result.choices[0].logprobs:
        row["logprobs"] = [p.logprob for p in result.choices[0].logprobs]
    return row
