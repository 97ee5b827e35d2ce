"""How raw rows spell turns: OpenAI's, ShareGPT's and Anthropic's messages, rounds, texts in turn, Alpaca's history."""

from __future__ import annotations

import json
import re
from typing import Any

from fledge.records.kinds import ROLES, Message, Role
from fledge.records.rejects import Reason, near
from fledge.records.values import Misfit, Values, as_text, kind_name, text_at, unpacked

_ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "bing": "assistant",
    "bard": "assistant", "ai": "assistant", "moss": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "developer": "system",
    "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
    "tool_response": "tool", "tool_result": "tool",
    "用户": "user", "助手": "assistant", "系统": "system", "工具": "tool",
}  # fmt: skip
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
_CALL_ROLES = ("function_call", "tool_call")
_ASKED = ("human", "user", "prompt", "question", "input", "问")
_ANSWERED = ("assistant", "gpt", "bot", "response", "answer", "output", "答")
"""A round in one object, as some Chinese collections have it: {"human": …, "assistant": …}."""
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def messages(key: str, value: Any) -> tuple[Message, ...]:
    """A list of turns: OpenAI's or ShareGPT's, rounds of question and answer, or texts that take turns. A text is one
    turn of the user, unless it is a list of turns as JSON, as in the cell of a table."""
    value = _unpacked_turns(value)
    if isinstance(value, str):
        return (Message("user", text_at(key, value)),)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise Misfit('"{key}" has lists of different lengths', key=key)
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]  # as `datasets` has
    if not isinstance(value, list):
        raise Misfit('"{key}" is {found} where a list of messages is wanted', key=key, found=kind_name(value))
    if not value:
        raise Misfit('"{key}" is empty', key=key)
    if len(value) > 1 and all(isinstance(turn, str) for turn in value):
        roles: tuple[Role, Role] = ("user", "assistant")
        return tuple(Message(roles[i % 2], text_at(f"{key}[{i}]", turn)) for i, turn in enumerate(value))
    return tuple(message for i, turn in enumerate(value) for message in _turn(f"{key}[{i}]", turn))


def _unpacked_turns(value: Any) -> Any:
    """The list of turns that a text holds as JSON; anything else as it is."""
    turns = unpacked(value, list)
    are_turns = (
        isinstance(turns, list) and turns and all(isinstance(t, dict) and t.keys() & {*_ROLE_KEYS} for t in turns)
    )
    return turns if are_turns else value


def _turn(where: str, turn: Any) -> list[Message]:
    """One message; two where an object holds a question with its answer; several where Anthropic's parts do."""
    if not isinstance(turn, dict):
        raise Misfit('"{key}" is {found} where a message is wanted', key=where, found=kind_name(turn))
    turn = {key: value for key, value in turn.items() if value is not None and value != []}
    if not any(key in turn for key in _ROLE_KEYS):
        asked, answered = (next((key for key in names if key in turn), "") for names in (_ASKED, _ANSWERED))
        sides: list[tuple[str, Role]] = [("system", "system"), (asked, "user"), (answered, "assistant")]
        said = [(key, role) for key, role in sides if key in turn]
        if (asked and answered) or len(turn) == len(said) == 1:
            return [Message(role, text_at(f"{where}.{key}", turn[key])) for key, role in said]
    if isinstance(turn.get("content"), list) and _ANTHROPIC & {
        part.get("type") for part in turn["content"] if isinstance(part, dict)
    }:
        return _parts(where, turn)
    return [_message(where, turn)]


_ANTHROPIC = {"tool_use", "tool_result"}


def _parts(where: str, turn: dict[str, Any]) -> list[Message]:
    """Anthropic's parts: calls of tools stay with their turn, each result is a turn of the tool."""
    of_type: dict[str, list[dict[str, Any]]] = {}
    for part in turn["content"]:
        of_type.setdefault(str(part.get("type")) if isinstance(part, dict) else "", []).append(part)
    results = []
    for part in of_type.pop("tool_result", []):
        said = _content(f"{where}.content", part.get("content", ""), may_be_empty=True)
        results.append(Message("tool", said, tool_call_id=as_text(part.get("tool_use_id", ""))))
    calls = [
        {"id": part.get("id", ""), "type": "function",
         "function": {"name": part.get("name", ""), "arguments": json.dumps(part.get("input"), ensure_ascii=False)}}
        for part in of_type.pop("tool_use", [])
    ]  # fmt: skip
    rest = [part for parts in of_type.values() for part in parts]
    if not rest and not calls:
        return results
    spoken = {**turn, "content": rest or "", **({"tool_calls": calls} if calls else {})}
    return [*results, _message(where, spoken)]


def _message(where: str, turn: dict[str, Any]) -> Message:
    role_key = _key(where, turn, _ROLE_KEYS)
    said = str(turn[role_key]).strip().lower()
    role = _ROLE_NAMES.get(said)
    if role is None:
        hint = near(str(turn[role_key]), _ROLE_NAMES) or Reason("allowed: {value}", value=", ".join(ROLES))
        raise Misfit('"{key}" is unknown; {hint}', key=f"{where}.{role_key}: {turn[role_key]}", hint=hint)
    calls = _calls(where, turn, said)
    if said in _CALL_ROLES or (calls and not set(_CONTENT_KEYS) & turn.keys()):
        content = ""
    else:
        key = _key(where, turn, _CONTENT_KEYS)
        content = _content(f"{where}.{key}", turn[key], may_be_empty=bool(calls))
    return Message(role, content, as_text(turn.get("name", "")), calls, as_text(turn.get("tool_call_id", "")))


def _key(where: str, turn: dict[str, Any], names: tuple[str, ...]) -> str:
    """Under which of its names a turn's role or content stands."""
    for name in names:
        if name in turn:
            return name
    for key in turn:
        if hint := near(str(key), names):
            raise Misfit('"{key}" is unknown; {hint}', key=f"{where}.{key}", hint=hint)
    raise Misfit('"{key}" is missing', key=f"{where}.{names[0]}")


def _calls(where: str, turn: dict[str, Any], role: str) -> str:
    """The turn's calls of tools as OpenAI's JSON: `tool_calls`, the older `function_call`, ShareGPT's turn of it."""
    calls = turn.get("tool_calls", "")
    if role in _CALL_ROLES or "function_call" in turn:
        key = next((key for key in _CONTENT_KEYS if key in turn), "value") if role in _CALL_ROLES else "function_call"
        said = _parsed(f"{where}.{key}", turn.get(key))
        calls = [{"type": "function", "function": call} for call in (said if isinstance(said, list) else [said])]
    elif isinstance(calls, str) and calls:
        _parsed(f"{where}.tool_calls", calls)
    return calls if isinstance(calls, str) else json.dumps(calls, ensure_ascii=False)


def _parsed(key: str, value: Any) -> Any:
    """The value of a JSON text; anything but a text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise Misfit('"{key}" is not valid JSON', key=key) from None


def _content(key: str, value: Any, may_be_empty: bool) -> str:
    """A text, or OpenAI's list of parts as long as all of them are text."""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(parts) != len(value):
            raise Misfit('"{key}" has parts that are not text', key=key)
        value = "\n".join(part["text"] for part in parts)
    return text_at(key, value, may_be_empty)


def answer_turns(key: str, value: Any) -> tuple[Message, ...]:
    """An answer as turns: a text is the assistant's (or a whole dialogue in the notation of Anthropic's HH data),
    a list is a conversation or its end."""
    value = _unpacked_turns(value)
    if isinstance(value, str):
        parts = _HH_TURN.split(value)
        if len(parts) > 1 and not parts[0].strip():
            said = zip(parts[1::2], (text_at(key, text).strip() for text in parts[2::2]), strict=True)
            return tuple(Message("user" if who == "Human" else "assistant", text) for who, text in said)
        return (assistant(key, value),)
    return messages(key, [value] if isinstance(value, dict) else value)


def opening(values: Values) -> tuple[Message, ...]:
    """The system prompt and the earlier rounds that Alpaca-like rows carry beside their own."""
    system = values.get("system") or ""
    opening = [Message("system", text_at("system", system))] if system else []
    history = unpacked(values.get("history"), list) or []
    if not isinstance(history, list):
        raise Misfit('"{key}" is {found} where a list is wanted', key="history", found=kind_name(history))
    if any(isinstance(turns, dict) for turns in history):
        return (*opening, *messages("history", history))
    for i, turns in enumerate(history):
        if not (isinstance(turns, list) and len(turns) == 2):
            raise Misfit('"{key}" is not a pair of texts', key=f"history[{i}]")
        question, answer = turns
        opening += [Message("user", text_at(f"history[{i}][0]", question)), assistant(f"history[{i}][1]", answer)]
    return tuple(opening)


def with_input(turns: tuple[Message, ...], values: Values) -> tuple[Message, ...]:
    """Alpaca's `input` goes a line below the instruction."""
    extra = text_at("input", values.get("input", ""), may_be_empty=True)
    if not extra or not turns:
        return turns
    return (*turns[:-1], Message("user", f"{turns[-1].content}\n{extra}"))


def assistant(key: str, value: Any) -> Message:
    return Message("assistant", text_at(key, value))
