"""What is left out when a conversation outgrows the context."""

from __future__ import annotations

import pytest

from fledge.inference.engine import PromptTooLong, Request
from fledge.inference.history import fitted
from fledge.inference.native import NativeEngine
from fledge.records.kinds import Message

TALK = tuple(Message("user" if n % 2 == 0 else "assistant", f"{n} " + "x" * 20) for n in range(9))


def contents(request: Request) -> list[str]:
    return [message.content.split()[0] for message in request.messages or ()]


def test_a_short_talk_stays_whole(engine: NativeEngine) -> None:
    request = Request(messages=TALK[:3], max_new_tokens=10)
    assert fitted(engine, request) == (request, 0)


def test_the_oldest_turns_go_and_the_system_prompt_stays(engine: NativeEngine) -> None:
    request, left_out = fitted(engine, Request(messages=(Message("system", "be"), *TALK), max_new_tokens=20))
    kept = contents(request)
    assert kept[0] == "be" and kept[-1] == "8" and 0 < left_out < 8
    assert (request.messages or ())[1].role == "user" and len(kept) == 1 + 9 - left_out
    assert engine.count(request) + 20 <= engine.context
    longer = Request(messages=(Message("system", "be"), *TALK[left_out - 2 :]), max_new_tokens=20)
    try:
        too_many = engine.count(longer) + 20 > engine.context
    except PromptTooLong:
        too_many = True
    assert too_many, "two turns more would have fitted"


def test_a_last_message_that_is_too_long_is_an_error(engine: NativeEngine) -> None:
    with pytest.raises(PromptTooLong):
        fitted(engine, Request(messages=(*TALK, Message("user", "y" * 300))))
