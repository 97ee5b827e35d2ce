"""What a technique works with: the `Question`, and a `Talk` that asks an engine and keeps every step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.language import is_chinese
from fledge.inference.engine import Constraint, Request, Result
from fledge.inference.prompting.program import Program
from fledge.inference.prompting.wordings import Language, say
from fledge.records.kinds import Message

if TYPE_CHECKING:
    from fledge.inference.prompting.tools import Tool


@dataclass(frozen=True)
class Question:
    """What is asked: a conversation whose last message is the question itself.

    For a model that only continues text (`chat` false) it becomes the paper's "Question: … Answer:"; `prefix` is how
    that answer begins.
    """

    messages: tuple[Message, ...]
    language: Language
    chat: bool = True
    prefix: str = ""
    about: str = ""
    """the question as the user put it, whatever a technique has made of it"""

    @classmethod
    def of(cls, given: str | Sequence[Message], chat: bool = True) -> Question:
        """A question from its text or its conversation. Raises FledgeError when there is nothing to answer."""
        messages = (Message("user", given),) if isinstance(given, str) else tuple(given)
        if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
            raise FledgeError(Problem(t("a technique needs a question: the last message is the user's, and not empty")))
        text = messages[-1].content
        return cls(messages, "zh" if is_chinese(text) else "en", chat, about=text)

    @property
    def text(self) -> str:
        """The question itself."""
        return self.messages[-1].content

    def asking(self, text: str) -> Question:
        """Another question in its place, in the same conversation."""
        return replace(self, messages=(*self.messages[:-1], replace(self.messages[-1], content=text)), prefix="")

    def alone(self, text: str) -> Question:
        """A question with nothing before it but the system's message."""
        system = tuple(message for message in self.messages[:1] if message.role == "system")
        return replace(self, messages=(*system, Message("user", text)), prefix="")

    def beginning(self, prefix: str) -> Question:
        """The same, its answer begun (text models only)."""
        return replace(self, prefix=prefix)

    def under(self, system: str) -> Question:
        """The same, with more in the system's message."""
        if self.messages[0].role == "system":
            first = replace(self.messages[0], content=f"{self.messages[0].content}\n\n{system}")
            return replace(self, messages=(first, *self.messages[1:]))
        return replace(self, messages=(Message("system", system), *self.messages))

    def after(self, turns: Sequence[Message]) -> Question:
        """The same, with turns right before the question."""
        return replace(self, messages=(*self.messages[:-1], *turns, self.messages[-1]))

    def followed_by(self, answer: str, text: str) -> Question:
        """The question, an answer to it, and what is asked next."""
        turns = (Message("assistant", answer), Message("user", text))
        return replace(self, messages=(*self.messages, *turns), prefix="")

    def plain(self) -> str:
        """The whole as a text to continue."""
        heads = {"user": say(self.language, "labels", "question"), "assistant": say(self.language, "labels", "answer")}
        gap = " " if self.language == "en" else ""
        parts = [
            f"{heads[message.role]}{gap}{message.content}" if message.role in heads else message.content
            for message in self.messages
        ]
        opened = heads["assistant"] + (gap + self.prefix if self.prefix else "")
        ends = ["\n" if message.role == "user" else "\n\n" for message in self.messages]
        return "".join(part + end for part, end in zip(parts, ends, strict=True)) + opened


@dataclass(frozen=True)
class Step:
    """One step of a trace: a question to the model and its answer, a tool and what it gave, or a decision."""

    role: str
    """what it was for: "answer", "extract", "propose", "value", "act", "tool", "check", "reflect", "vote", …"""
    prompt: tuple[Message, ...] | str = ""
    """the conversation, or the text, that was given to the model"""
    answer: str = ""
    tool: str = ""
    observation: str = ""
    branch: str = ""
    """which of several lines of work it belongs to, as "sample 2" or "attempt 1/sample 3"; "" for the only one"""
    finish: str = ""
    """why the model stopped: "stop", "length"; "" where it was not asked"""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """The step as JSON values; what is empty is left out."""
        prompt = self.prompt if isinstance(self.prompt, str) else [message.to_dict() for message in self.prompt]
        values = {**vars(self), "prompt": prompt}
        return {key: value for key, value in values.items() if key == "role" or value not in ("", [], 0)}


@dataclass(frozen=True)
class Solution:
    """What a program found: the answer, and the text in which it stood (the reasoning with it)."""

    answer: str
    text: str


Check = Callable[[Question, Solution], str]
"""Says what is wrong with a solution; "" when nothing is."""
Listen = Callable[[Step], None]
"""Hears every step of a trace as soon as it is done."""


@dataclass(frozen=True)
class Ask:
    """One of several questions that are asked at once."""

    question: Question
    branch: str = ""
    stop: tuple[str, ...] = ()


@dataclass
class Talk:
    """One technique's talk with one engine: it makes the requests, counts the tokens, keeps the trace.

    Every request gets a seed of its own, from the base's, its branch and its number there, so that the same seed gives
    the same trace; without a seed every one is drawn.
    """

    base: Request
    """how to sample; its prompt is not looked at"""
    technique: str = ""
    tools: Mapping[str, Tool] = field(default_factory=dict)
    check: Check | None = None
    listen: Listen = lambda step: None
    branch: str = ""
    steps: list[Step] = field(default_factory=list)
    _asked: int = 0

    def within(self, branch: str, **changes: Any) -> Talk:
        """The same talk on a line of work of its own, other sampling options changed; the trace is shared."""
        name = f"{self.branch}/{branch}" if self.branch else branch
        return replace(self, base=replace(self.base, **changes), branch=name, _asked=0)

    def ask(
        self, role: str, question: Question, stop: tuple[str, ...] = (), constraint: Constraint | None = None
    ) -> Program[str]:
        """The model's answer."""
        texts = yield from self.ask_all(role, [Ask(question, stop=stop)], constraint)
        return texts[0]

    def ask_all(self, role: str, asks: Sequence[Ask], constraint: Constraint | None = None) -> Program[list[str]]:
        """The answers to several questions, asked as one batch. Raises the engine's error with the step's name."""
        requests = [self._request(ask, constraint) for ask in asks]
        if not requests:
            return []
        results = yield requests
        texts = []
        for ask, request, result in zip(asks, requests, results, strict=True):
            choice = self._sound(role, result).choice
            text = choice.text.strip()
            branch = "/".join(part for part in (self.branch, ask.branch) if part)
            prompt = request.messages if request.messages is not None else request.text or ""
            self.note(
                Step(role, prompt, text, branch=branch, finish=choice.finish_reason,
                     prompt_tokens=result.prompt_tokens, completion_tokens=len(choice.token_ids))
            )  # fmt: skip
            texts.append(text)
        return texts

    def note(self, step: Step) -> None:
        """Put a step into the trace."""
        self.steps.append(step)
        self.listen(step)

    def decide(self, role: str, answer: str = "", tool: str = "", observation: str = "") -> None:
        """A step in which the model was not asked."""
        self.note(Step(role, answer=answer, tool=tool, observation=observation, branch=self.branch))

    def _request(self, ask: Ask, constraint: Constraint | None) -> Request:
        question = ask.question
        stop = (*self.base.stop, *ask.stop)
        prompt: dict[str, Any] = {"messages": question.messages, "text": None}
        if not question.chat:  # it would go on with a question of its own
            stop = (*stop, "\n" + say(question.language, "labels", "question"))
            prompt = {"messages": None, "text": question.plain()}
        seed, self._asked = self._seed(ask.branch), self._asked + 1
        return replace(
            self.base, **prompt, prompt_ids=None, n=1, stop=tuple(dict.fromkeys(stop)), seed=seed, constraint=constraint
        )

    def _seed(self, branch: str) -> int | None:
        if self.base.seed is None:
            return None
        whole = f"{self.base.seed} {self.branch}/{branch} {self._asked}"
        return int.from_bytes(sha256(whole.encode()).digest()[:4], "big") >> 1

    def _sound(self, role: str, result: Result) -> Result:
        error = result.error
        if error is None and any(choice.finish_reason == "cancelled" for choice in result.choices):
            error = FledgeError(Problem(t("the engine is closed")))
        if error is None:
            return result
        where = t("step {role} of {technique}", role=role, technique=self.technique or "—")
        named = type(error)(*(replace(p, where=f"{where}, {p.where}" if p.where else where) for p in error.problems))
        vars(named).update({**vars(error), "problems": named.problems})  # what else a kind of error carries
        raise named from error
