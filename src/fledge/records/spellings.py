"""How raw rows spell the records: each function makes one kind of record of a row's values, or raises Misfit.

`values` is the row under its format's own names (`formats.FORMATS` says which keys these may stand under), `common`
the record's id, language, source and meta.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeAlias

from fledge.records.kinds import (
    ROLES,
    Answer,
    Conversation,
    Document,
    Labelled,
    Message,
    Preference,
    Prompt,
    Rating,
    Role,
)
from fledge.records.rejects import Reason, near

Values: TypeAlias = dict[str, Any]
Common: TypeAlias = dict[str, Any]

_ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "bing": "assistant",
    "bard": "assistant", "function_call": "assistant",
    "developer": "system",
    "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class Misfit(Exception):
    """A row is not of its file's format; the reason says which key and why."""

    def __init__(self, sentence: str, **values: object) -> None:
        super().__init__(sentence)
        self.reason = Reason(sentence, **values)


# --- records --------------------------------------------------------------------------------------------------------


def document(values: Values, common: Common) -> Document:
    """`text`."""
    return Document(text_at("text", values["text"]), **common)


def labelled(values: Values, common: Common) -> Labelled:
    """`text`, `label` (a text, a number or a truth value)."""
    label = values["label"]
    if isinstance(label, (list, dict)) or not str(label).strip():
        raise Misfit('"{key}" is {found} where a class is wanted', key="label", found=kind_name(label))
    return Labelled(text_at("text", values["text"]), str(label), **common)


def conversation(values: Values, common: Common) -> Conversation:
    """`messages`; `system`."""
    turns = messages("messages", values["messages"])
    if turns[0].role != "system":
        turns = (*_opening(values), *turns)
    if all(message.role in ("system", "tool") for message in turns):
        raise Misfit('"{key}" has no turn of a user or an assistant', key="messages")
    return Conversation(turns, **common)


def alpaca(values: Values, common: Common) -> Conversation:
    """`instruction`, `output`; `input` (a line below the instruction), `history`, `system`."""
    prompt = _with_input((Message("user", text_at("instruction", values["instruction"])),), values)
    return Conversation((*_opening(values), *prompt, _assistant("output", values["output"])), **common)


def pair(values: Values, common: Common) -> Conversation:
    """`prompt`, `response`; `history`, `system`."""
    prompt = messages("prompt", values["prompt"])
    return Conversation((*_opening(values), *prompt, _assistant("response", values["response"])), **common)


def rating(values: Values, common: Common) -> Rating:
    """`prompt`, `answer`, `score`; `history`, `system`."""
    prompt = (*_opening(values), *messages("prompt", values["prompt"]))
    return Rating(prompt, text_at("answer", values["answer"]), _number("score", values["score"]), **common)


def prompt(values: Values, common: Common) -> Prompt:
    """`prompt`; `answer`, `history`, `system`. A conversation's last answer is taken as the answer."""
    turns = (*_opening(values), *messages("prompt", values["prompt"]))
    answer = as_text(values.get("answer", ""))
    if turns[-1].role == "assistant" and len(turns) > 1:
        turns, answer = turns[:-1], answer or turns[-1].content
    return Prompt(turns, answer, **common)


def preference(values: Values, common: Common) -> Preference:
    """`chosen`, `rejected`: answers, or conversations whose common beginning is the prompt; `prompt`, `input`,
    `history`, `system`."""
    given = messages("prompt", values["prompt"]) if "prompt" in values else ()
    given = (*_opening(values), *_with_input(given, values))
    chosen, rejected = (_answer_turns(name, values[name]) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise Misfit('"chosen" and "rejected" are the same')
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    before = chosen[:shared]
    repeats_prompt = before[len(before) - len(given) :] == given
    turns = before if repeats_prompt else (*given, *before)
    for name, answer in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if len(answer) != 1 or answer[0].role != "assistant" or not turns:
            raise Misfit('"{key}" is not one answer after the same prompt', key=name)
    return Preference(turns, (Answer(chosen[-1].content, 1), Answer(rejected[-1].content, 2)), **common)


def ranking(values: Values, common: Common) -> Preference:
    """`prompt`, `answers` (texts, or objects with content, rank or score, by), `ranks` (1 is the best) or `scores`
    (higher is better); `history`, `system`."""
    answers = values["answers"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise Misfit('"{key}" is not a list of two answers or more', key="answers")
    items = [answer if isinstance(answer, dict) else {"content": answer} for answer in answers]
    order_key = "ranks" if "ranks" in values or any("rank" in item for item in items) else "scores"
    order = values.get(order_key, [item.get(order_key[:-1]) for item in items])
    if not isinstance(order, list) or len(order) != len(items):
        raise Misfit('there is not one rank or score for each of "{key}"', key="answers")
    numbers = [_number(order_key, value) * (1 if order_key == "ranks" else -1) for value in order]
    ranks = sorted(set(numbers))
    found = []
    for i, (item, number) in enumerate(zip(items, numbers, strict=True)):
        content = next((item[key] for key in ("content", "text", "answer", "response") if key in item), None)
        by = as_text(item.get("by") or item.get("model") or "")
        found.append(Answer(text_at(f"answers[{i}]", content), ranks.index(number) + 1, by))
    return Preference((*_opening(values), *messages("prompt", values["prompt"])), tuple(found), **common)


# --- turns ----------------------------------------------------------------------------------------------------------


def messages(key: str, value: Any) -> tuple[Message, ...]:
    """A list of turns, OpenAI's or ShareGPT's; a text is one turn of the user."""
    if isinstance(value, str):
        return (Message("user", text_at(key, value)),)
    if not isinstance(value, list):
        raise Misfit('"{key}" is {found} where a list of messages is wanted', key=key, found=kind_name(value))
    if not value:
        raise Misfit('"{key}" is empty', key=key)
    return tuple(_message(f"{key}[{i}]", turn) for i, turn in enumerate(value))


def _message(where: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Misfit('"{key}" is {found} where a message is wanted', key=where, found=kind_name(turn))
    turn = {key: value for key, value in turn.items() if value is not None and value != []}
    role_key = _key(where, turn, ("role", "from"))
    role = _ROLE_NAMES.get(str(turn[role_key]).strip().lower())
    if role is None:
        hint = near(str(turn[role_key]), _ROLE_NAMES) or Reason("allowed: {value}", value=", ".join(ROLES))
        raise Misfit('"{key}" is unknown; {hint}', key=f"{where}.{role_key}: {turn[role_key]}", hint=hint)
    calls = _calls(where, turn, str(turn[role_key]))
    if turn[role_key] == "function_call" or (calls and not {"content", "value"} & turn.keys()):
        content = ""
    else:
        key = _key(where, turn, ("content", "value"))
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
    if role == "function_call" or "function_call" in turn:
        key = "value" if role == "function_call" else "function_call"
        calls = [{"type": "function", "function": _parsed(f"{where}.{key}", turn.get(key))}]
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


def _answer_turns(key: str, value: Any) -> tuple[Message, ...]:
    """An answer as turns: a text is the assistant's (or a whole dialogue in the notation of Anthropic's HH data),
    a list is a conversation or its end."""
    if isinstance(value, str):
        parts = _HH_TURN.split(value)
        if len(parts) > 1 and not parts[0].strip():
            said = zip(parts[1::2], (text_at(key, text).strip() for text in parts[2::2]), strict=True)
            return tuple(Message("user" if who == "Human" else "assistant", text) for who, text in said)
        return (_assistant(key, value),)
    return messages(key, [value] if isinstance(value, dict) else value)


def _opening(values: Values) -> tuple[Message, ...]:
    """The system prompt and the earlier rounds that Alpaca-like rows carry beside their own."""
    system = values.get("system") or ""
    opening = [Message("system", text_at("system", system))] if system else []
    for i, turns in enumerate(values.get("history") or []):
        if not (isinstance(turns, list) and len(turns) == 2):
            raise Misfit('"{key}" is not a pair of texts', key=f"history[{i}]")
        question, answer = turns
        opening += [Message("user", text_at(f"history[{i}][0]", question)), _assistant(f"history[{i}][1]", answer)]
    return tuple(opening)


def _with_input(turns: tuple[Message, ...], values: Values) -> tuple[Message, ...]:
    """Alpaca's `input` goes a line below the instruction."""
    extra = text_at("input", values.get("input", ""), may_be_empty=True)
    if not extra or not turns:
        return turns
    return (*turns[:-1], Message("user", f"{turns[-1].content}\n{extra}"))


def _assistant(key: str, value: Any) -> Message:
    return Message("assistant", text_at(key, value))


# --- values ---------------------------------------------------------------------------------------------------------


def text_at(key: str, value: Any, may_be_empty: bool = False) -> str:
    """The text itself. Raises Misfit where it is none, or blank."""
    if not isinstance(value, str):
        raise Misfit('"{key}" is {found} where a text is wanted', key=key, found=kind_name(value))
    if not may_be_empty and not value.strip():
        raise Misfit('"{key}" is empty', key=key)
    return value


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Misfit('"{key}" is {found} where a number is wanted', key=key, found=kind_name(value))
    return number


def as_text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def kind_name(value: Any) -> Reason:
    """What a JSON value is, for messages."""
    match value:
        case None:
            return Reason("nothing")
        case str():
            return Reason("a text")
        case bool() | int() | float():
            return Reason("a number")
        case list():
            return Reason("a list")
        case dict():
            return Reason("an object")
    return Reason("{type}", type=type(value).__name__)
