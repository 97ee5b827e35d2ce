"""An engine that needs no model: it reads letters as tokens and knows how likely each is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fledge.core.artifact import Artifact
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.reference import resolve
from fledge.core.stage import Config, Execution
from fledge.evaluation.subject import Subject
from fledge.inference.engine import Choice, Request, Result, Scored

END = 1


@dataclass
class LetterEngine:
    """log p of a letter is −1, of the letters in `liked` `liked[letter]`; the end of a turn costs `end`."""

    liked: dict[str, float] = field(default_factory=dict)
    end: float = -5.0
    context: int = 1000
    says: dict[str, str] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    closed: bool = False

    def logprob(self, token: int) -> float:
        return self.end if token == END else self.liked.get(chr(token), -1.0)

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        self.asked += [(list(p), list(c)) for p, c in zip(prompts, continuations, strict=True)]
        assert all(prompts) and all(continuations)
        assert all(len(p) + len(c) - 1 <= self.context for p, c in zip(prompts, continuations, strict=True))
        return [Scored(tuple(map(self.logprob, c)), tuple(t != END for t in c)) for c in continuations]

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        self.asked += requests
        asked = [r.messages[-1].content if r.messages else r.text or "" for r in requests]
        return [Result((Choice(self.says.get(text, "?"), (), "stop"),)) for text in asked]

    def reward(self, conversations: Sequence[Any]) -> list[float]:
        return [float(c.messages[-1].content.count("good")) for c in conversations]

    def close(self) -> None:
        self.closed = True


class LetterRenderer:
    """`<role>content` and an end of turn behind every answer; the loss is on answers and their ends."""

    stop_ids = (END,)
    template = "letters"

    def render(self, messages: Sequence[Any], add_generation_prompt: bool = False) -> Any:
        ids: list[int] = []
        weights: list[float] = []
        for message in messages:
            content = [ord(c) for c in message.content] + [END]
            ids += [*map(ord, f"<{message.role}>"), *content]
            weights += [0.0] * (len(message.role) + 2) + [float(message.role == "assistant")] * len(content)
        if add_generation_prompt:
            ids += [*map(ord, "<assistant>")]
        return SimpleNamespace(ids=ids, weights=weights)

    def render_answers(self, prompt: Sequence[Any], answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        return self.render(prompt, True).ids, [[*map(ord, answer), END] for answer in answers]


def letters(text: str) -> Any:
    """A tokenizer of letters."""
    return SimpleNamespace(input_ids=[ord(c) for c in text])


def subject(name: str = "a", engine: LetterEngine | None = None, **options: Any) -> Subject:
    """A model that scores letters."""
    return Subject(name, engine or LetterEngine(), letters, LetterRenderer(), **options)  # type: ignore[arg-type]


def job_for(config: Config, folder: Path, inputs: dict[str, Artifact], events: list[Event] | None = None) -> Job:
    """A job with these inputs and every source of the config found."""
    from fledge.core.reference import Source
    from fledge.core.stage import walk

    (folder / "out").mkdir(parents=True, exist_ok=True)
    outside = {value.text: resolve(value.text) for _, value in walk(config) if isinstance(value, Source)}
    heard = events if events is not None else []
    emitter = Emitter("scores", 0, heard.append)
    return Job("scores", folder / "out", folder / "work", 0, Execution(device="cpu"), emitter, inputs, outside)


def nats(text: str) -> float:
    """What the letters of `text` cost the plain engine."""
    return math.fsum(1.0 for _ in text)
