"""What a technique is: its settings and its program in one class; and the `Outcome` of a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fledge.core.stage import Config
from fledge.inference.engine import Request
from fledge.inference.prompting.program import Generates, Program, drive
from fledge.inference.prompting.talk import Check, Listen, Question, Solution, Step, Talk

if TYPE_CHECKING:
    from fledge.inference.prompting.tools import Tool
    from fledge.records.kinds import Message


@dataclass(frozen=True)
class Outcome:
    """What a technique found, how, and at what price."""

    answer: str
    """the answer alone; numbers and letters of choices are normalised where one was extracted"""
    text: str
    """the text that it was taken from: the reasoning with it"""
    trace: tuple[Step, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Tokens read in all steps together."""
        return sum(step.prompt_tokens for step in self.trace)

    @property
    def completion_tokens(self) -> int:
        """Tokens written in all steps together."""
        return sum(step.completion_tokens for step in self.trace)

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        return {
            "answer": self.answer,
            "text": self.text,
            "trace": [step.to_json() for step in self.trace],
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }


class Technique(Config):
    """Base of the techniques. A subclass has a key `use`, its settings, and `program`.

    Techniques with a key `over` stand on another one: it answers what they ask, so that they can be put together.
    """

    guarded: ClassVar[tuple[str, ...]] = ()
    """settings that a server does not take from its clients: files of this machine, work that may never end"""
    verbatim: ClassVar[bool] = False
    """whether it only changes the question, which is asked once: the answer is what comes, word for word"""

    @property
    def name(self) -> str:
        """What it is called in settings and errors."""
        return str(self.use)  # type: ignore[attr-defined]

    @abstractmethod
    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        """How it answers a question: a generator of requests (see `program.py`)."""

    def needs(self) -> frozenset[str]:
        """The names of the tools that it uses, at any depth."""
        inner = getattr(self, "over", None)
        return inner.needs() if isinstance(inner, Technique) else frozenset()

    def guarded_settings(self) -> list[str]:
        """The names of those that are set, at any depth."""
        inner = getattr(self, "over", None)
        mine = [name for name in self.guarded if getattr(self, name)]
        return mine + (inner.guarded_settings() if isinstance(inner, Technique) else [])

    def streams(self) -> bool:
        """Whether the model's words are its answer, so that they can be shown while they are written."""
        inner = getattr(self, "over", None)
        return self.verbatim and (inner.streams() if isinstance(inner, Technique) else True)

    def calls(self) -> float:
        """About how many answers of the model one question takes."""
        inner = getattr(self, "over", None)
        return inner.calls() if isinstance(inner, Technique) else 1

    def solving(
        self,
        question: str | Sequence[Message] | Question,
        base: Request | None = None,
        *,
        tools: Mapping[str, Tool] | None = None,
        check: Check | None = None,
        listen: Listen = lambda step: None,
    ) -> Program[Outcome]:
        """The whole run as a program, to be driven alone or together with others. Arguments as in `run`."""
        asked = question if isinstance(question, Question) else Question.of(question)
        base = base or Request(text=asked.text, temperature=0.0)
        talk = Talk(base, self.name, dict(tools or {}), check, listen)
        solution = yield from self.program(asked, talk)
        return Outcome(solution.answer, solution.text, tuple(talk.steps))

    def run(
        self,
        engine: Generates,
        question: str | Sequence[Message] | Question,
        *,
        tools: Mapping[str, Tool] | None = None,
        check: Check | None = None,
        listen: Listen = lambda step: None,
        **sampling: Any,
    ) -> Outcome:
        """Answer a question (text, or a conversation that ends with it) with an engine.

        `sampling` are fields of `Request` (default: temperature 0); `max_new_tokens` holds for every step. `tools`
        are added to the built-in ones; `check` judges the attempts of `reflexion`. `listen` hears every step at once.
        Raises FledgeError with the name of the step when the engine fails.
        """
        base = replace(Request(text="-", temperature=0.0), **sampling)
        return drive(engine, self.solving(question, base, tools=tools, check=check, listen=listen))
