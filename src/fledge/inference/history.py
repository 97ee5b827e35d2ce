"""A conversation that outgrows the model's context: its oldest turns are left out, so that the talk can go on."""

from __future__ import annotations

from dataclasses import replace

from fledge.inference.engine import Engine, PromptTooLong, Request
from fledge.inference.engines.errors import CannotDo


def fitted(engine: Engine, request: Request) -> tuple[Request, int]:
    """The request with as many of its latest turns as leave room for an answer, and how many messages were left out.

    The system prompt and the last message always stay. Room is `max_new_tokens`, but no more than a quarter of the
    context. Raises FledgeError (as `submit` does) when the last message alone is too long.
    """
    messages = request.messages or ()
    opening = tuple(message for message in messages[:1] if message.role == "system")
    room = min(request.max_new_tokens or engine.context, engine.context // 4)
    starts = [n for n in range(len(opening), len(messages)) if messages[n].role == "user"] or [len(opening)]
    for start in starts:
        shorter = replace(request, messages=(*opening, *messages[start:]))
        try:
            if engine.count(shorter) + room <= engine.context or start == starts[-1]:
                return shorter, start - len(opening)
        except CannotDo:  # a server that counts no tokens says itself when it is too much
            return request, 0
        except PromptTooLong:
            if start == starts[-1]:
                raise
    return request, 0
