"""How raw rows spell the records: each function makes one kind of record of a row's values, or raises Misfit.

`values` is the row under its format's own names (`formats.FORMATS` says which keys these may stand under), `common`
the record's id, language, source and meta.
"""

from __future__ import annotations

from fledge.records.entities import Entity, from_tags, joined, marked
from fledge.records.kinds import Answer, Conversation, Document, Labelled, Message, Preference, Prompt, Rating
from fledge.records.rejects import Reason
from fledge.records.turns import answer_turns, assistant, messages, opening, with_input
from fledge.records.values import Common, Misfit, Values, as_text, kind_name, number, text_at, unpacked


def document(values: Values, common: Common) -> Document:
    """`text`."""
    return Document(text_at("text", values["text"]), **common)


def labelled(values: Values, common: Common) -> Labelled:
    """`text`, `label` (a text, a number or a truth value); a `second` text goes a line below the first."""
    label = values["label"]
    if isinstance(label, (list, dict)) or not str(label).strip():
        raise Misfit('"{key}" is {found} where a class is wanted', key="label", found=kind_name(label))
    text = text_at("text", values["text"])
    if "second" in values:
        text += "\n" + text_at("second", values["second"])
    return Labelled(text, str(label), **common)


def tagged(values: Values, common: Common) -> Labelled:
    """`tokens` and a tag for each of them (`tags`)."""
    tokens, tags = (unpacked(values[key], list) for key in ("tokens", "tags"))
    for key, found in (("tokens", tokens), ("tags", tags)):
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise Misfit('"{key}" is {found} where a list of texts is wanted', key=key, found=kind_name(found))
    if len(tokens) != len(tags) or not "".join(tokens).strip():
        raise Misfit('"{key}" has no tag for every token', key="tags")
    text, places = joined(tokens)
    found = [Entity(places[e.start][0], places[e.end - 1][1], e.type) for e in from_tags(tags) if e.type]
    return marked(text, [e for e in found if e.start < e.end], **common)


def entities(values: Values, common: Common) -> Labelled:
    """`text`, and its `entities` with `start`, `end` (exclusive) and `type`."""
    text, rows = text_at("text", values["text"]), unpacked(values["entities"], list)
    try:
        found = [Entity(int(row["start"]), int(row["end"]), str(row.get("type") or row["label"])) for row in rows]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise Misfit('"{key}" is no list of start, end and type', key="entities") from None
    if not all(0 <= entity.start < entity.end <= len(text) for entity in found):
        raise Misfit('"{key}" does not lie within the text', key="entities")
    return marked(text, found, **common)


def conversation(values: Values, common: Common) -> Conversation:
    """`messages`; `system`."""
    turns = messages("messages", values["messages"])
    if turns[0].role != "system":
        turns = (*opening(values), *turns)
    if all(message.role in ("system", "tool") for message in turns):
        raise Misfit('"{key}" has no turn of a user or an assistant', key="messages")
    return Conversation(turns, **common)


def alpaca(values: Values, common: Common) -> Conversation:
    """`instruction`, `output`; `input` (a line below the instruction), `history`, `system`."""
    prompt = with_input((Message("user", text_at("instruction", values["instruction"])),), values)
    return Conversation((*opening(values), *prompt, assistant("output", values["output"])), **common)


def pair(values: Values, common: Common) -> Conversation:
    """`prompt`, `response`; `history`, `system`."""
    prompt = messages("prompt", values["prompt"])
    return Conversation((*opening(values), *prompt, assistant("response", values["response"])), **common)


def rating(values: Values, common: Common) -> Rating:
    """`prompt`, `answer`, `score`; `history`, `system`."""
    prompt = (*opening(values), *messages("prompt", values["prompt"]))
    return Rating(prompt, text_at("answer", values["answer"]), number("score", values["score"]), **common)


def prompt(values: Values, common: Common) -> Prompt:
    """`prompt`; `answer`, `history`, `system`. A conversation's last answer is taken as the answer."""
    turns = (*opening(values), *messages("prompt", values["prompt"]))
    answer = as_text(values.get("answer", ""))
    if turns[-1].role == "assistant" and len(turns) > 1:
        turns, answer = turns[:-1], answer or turns[-1].content
    return Prompt(turns, answer, **common)


def judged(values: Values, common: Common) -> Rating:
    """`prompt`, `answer`, `label` (true or false)."""
    return rating({**values, "score": str(values["label"]).lower() == "true"}, common)


def preference(values: Values, common: Common) -> Preference:
    """`chosen`, `rejected`: answers, or conversations whose common beginning is the prompt; `prompt`, `input`,
    `history`, `system`."""
    return _of_two(values, ("chosen", "rejected"), (1, 2), common)


_FIRST = ("a", "model_a", "response_a", "answer_a", "0", "first")
_SECOND = ("b", "model_b", "response_b", "answer_b", "1", "second")


def comparison(values: Values, common: Common) -> Preference:
    """`a`, `b` and the `winner` ("a", "model_a", 0, …, or a tie); `prompt`, `input`, `history`, `system`."""
    winner = as_text(values["winner"]).strip().lower()
    if winner not in (*_FIRST, *_SECOND) and not winner.startswith("tie"):
        raise Misfit('"{key}" is unknown; {hint}', key=f"winner: {winner}", hint=Reason("allowed: a, b, tie"))
    ranks = (1, 1) if winner.startswith("tie") else ((1, 2) if winner in _FIRST else (2, 1))
    return _of_two(values, ("a", "b"), ranks, common)


def _of_two(values: Values, names: tuple[str, str], ranks: tuple[int, int], common: Common) -> Preference:
    given = values.get("input")
    if isinstance(given, dict) and "messages" in given:  # OpenAI's preference data
        values = {**values, "prompt": given["messages"], "input": ""}
    prompt = messages("prompt", values["prompt"]) if "prompt" in values else ()
    asked = (*opening(values), *with_input(prompt, values))
    first, second = (answer_turns(name, values[name]) for name in names)
    if first == second:
        raise Misfit('"{a}" and "{b}" are the same', a=names[0], b=names[1])
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    before = first[:shared]
    repeats_prompt = before[len(before) - len(asked) :] == asked
    turns = before if repeats_prompt else (*asked, *before)
    for name, answer in zip(names, (first[shared:], second[shared:]), strict=True):
        if len(answer) != 1 or answer[0].role != "assistant" or not turns:
            raise Misfit('"{key}" is not one answer after the same prompt', key=name)
    answers = (Answer(first[-1].content, ranks[0]), Answer(second[-1].content, ranks[1]))
    return Preference(turns, answers, **common)


def ordered(values: Values, common: Common) -> Preference:
    """`prompt`, `answers` (texts, the best first); `input`, `history`, `system`."""
    prompt = with_input((*opening(values), *messages("prompt", values["prompt"])), values)
    found = [Answer(text_at(f"answers[{i}]", text), i + 1) for i, text in enumerate(values["answers"])]
    return Preference(prompt, tuple(found), **common)


def ranking(values: Values, common: Common) -> Preference:
    """`prompt`, `answers` (texts, or objects with content, rank or score, by), `ranks` (1 is the best) or `scores`
    (higher is better); `history`, `system`."""
    answers = unpacked(values["answers"], list)
    if not isinstance(answers, list) or len(answers) < 2:
        raise Misfit('"{key}" is not a list of two answers or more', key="answers")
    items = [answer if isinstance(answer, dict) else {"content": answer} for answer in answers]
    order_key = "ranks" if "ranks" in values or any("rank" in item for item in items) else "scores"
    names = ("rank",) if order_key == "ranks" else ("score", "overall_score", "rating")
    inside = [next((item[name] for name in names if name in item), None) for item in items]
    order = unpacked(values.get(order_key, inside), list)
    if not isinstance(order, list) or len(order) != len(items):
        raise Misfit('there is not one rank or score for each of "{key}"', key="answers")
    numbers = [number(order_key, value) * (1 if order_key == "ranks" else -1) for value in order]
    ranks = sorted(set(numbers))
    found = []
    for i, (item, place) in enumerate(zip(items, numbers, strict=True)):
        content = next((item[key] for key in ("content", "text", "answer", "response") if key in item), None)
        by = as_text(item.get("by") or item.get("model") or "")
        found.append(Answer(text_at(f"answers[{i}]", content), ranks.index(place) + 1, by))
    return Preference((*opening(values), *messages("prompt", values["prompt"])), tuple(found), **common)
