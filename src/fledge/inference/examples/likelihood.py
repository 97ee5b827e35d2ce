"""Examples and a question as text, and how likely a model finds an answer behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fledge.data.language import is_chinese
from fledge.inference.engine import Engine
from fledge.inference.examples.example import Example


def shown(examples: Sequence[Example], query: str) -> str:
    """Examples and question as text to go on from, with the question's language in the labels."""
    ask, answer = ("问题：", "回答：") if is_chinese(query) else ("Question: ", "Answer: ")
    blocks = [f"{ask}{example.question}\n{answer}{example.answer}\n\n" for example in examples]
    return "".join(blocks) + f"{ask}{query}\n{answer}".rstrip(" ")


def likelihoods(
    engine: Engine, rows: Sequence[tuple[Sequence[Example], str, str]], show: Callable[..., str] = shown
) -> tuple[list[float], list[bool]]:
    """Of each (examples, question, answer): the answer's mean log-probability a token, and whether it is what the model
    would write itself, token for token."""
    pairs = [_encoded(engine, show(examples, query), query, answer) for examples, query, answer in rows]
    scored = engine.score([prompt for prompt, _ in pairs], [continuation for _, continuation in pairs])
    return [row.total / len(row.logprobs) for row in scored], [all(row.greedy) for row in scored]


def _encoded(engine: Engine, prompt: str, query: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of both, cut where the prompt's own end, clipped from the left to the model's context."""
    gap = "" if prompt.endswith(("：", " ")) else " "
    head = engine.encode(prompt)
    whole = engine.encode(prompt + gap + answer)
    continuation = whole[len(head) :] or whole[-1:]
    room = max(1, engine.context + 1 - len(continuation))
    return head[-room:], continuation
