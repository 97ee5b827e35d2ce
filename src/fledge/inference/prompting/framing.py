"""Ways to put a question: as it is, in a role, through a template, in a format, after examples.

They change what is asked and leave the answering to the technique that they stand `over`.
"""

from __future__ import annotations

import json
from string import Formatter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.stage import Config
from fledge.data.language import is_chinese
from fledge.inference.engine import Constraint
from fledge.inference.prompting.base import Technique
from fledge.inference.prompting.program import Program
from fledge.inference.prompting.talk import Question, Solution, Talk
from fledge.inference.prompting.wordings import Language, say
from fledge.records.kinds import Message

if TYPE_CHECKING:
    from fledge.inference.prompting.techniques import AnyTechnique


class Direct(Technique):
    """The question as it is, and the model's answer as it is."""

    verbatim: ClassVar[bool] = True

    use: Literal["direct"] = Field("direct", description="the question as it is")

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        text = yield from talk.ask("answer", question)
        return Solution(text, text)


class Role(Technique):
    """Who the model is: a system message of a role, its traits, its principles and the form of its answers."""

    verbatim: ClassVar[bool] = True

    use: Literal["role"] = Field("role", description="who answers")
    role: str = Field(min_length=1, description="who the model is: `a patient teacher`, `资深的中文编辑`")
    traits: list[str] = Field([], description="what marks this role, one sentence each")
    principles: list[str] = Field([], description="what to heed in every answer, one sentence each")
    output: str = Field("", description="how an answer is to be written")
    over: AnyTechnique | None = Field(None, description="the technique that answers; without one, the model directly")

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        lang = question.language
        parts = [say(lang, "role", "who", role=self.role)]
        for key, items in (("traits", self.traits), ("principles", self.principles)):
            if items:
                lines = [f"{n}. {item}" for n, item in enumerate(items, start=1)]
                parts.append("\n".join([say(lang, "role", key), *lines]))
        if self.output:
            parts.append(say(lang, "role", "output") + "\n" + self.output)
        return (yield from inner(self.over).program(question.under("\n\n".join(parts)), talk))


class Template(Technique):
    """The question inside a text of your own. `{question}` stands for it, other names for `values`."""

    verbatim: ClassVar[bool] = True

    use: Literal["template"] = Field("template", description="the question inside a text of your own")
    text: str = Field(description="what the model is told; {question} and every {name} of `values` are filled in")
    values: dict[str, str] = Field(default_factory=dict, description="what the other names stand for")
    over: AnyTechnique | None = Field(None, description="the technique that answers; without one, the model directly")

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        try:
            fields = [field for field in Formatter().parse(self.text) if field[1] is not None]
            if odd := [
                name for _, name, spec, conversion in fields if spec or conversion or not str(name).isidentifier()
            ]:
                raise ValueError("{" + str(odd[0]) + "…}")
            names = {str(name) for _, name, _, _ in fields}
        except ValueError as error:
            raise ValueError(t("the template cannot be read: {message} (a brace of its own is written twice)",
                               message=str(error))) from None  # fmt: skip
        if "question" not in names:
            raise ValueError(t("the template has no place for the question: {name}", name="{question}"))
        if wrong := sorted((names - {"question"}) ^ set(self.values)):
            raise ValueError(t("names in the template and in values differ: {names}", names=", ".join(wrong)))
        return self

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        asked = question.asking(self.text.format(question=question.text, **self.values))
        return (yield from inner(self.over).program(asked, talk))


class Format(Technique):
    """An answer in a form: the engine's decoder holds it to the form, so that it is always kept.

    Of the answer of the technique that it stands over, the form is made in a last step; alone, it is the one answer.
    The result is checked as well: an engine that only pretends to hold a form is an error, not a wrong answer.
    """

    use: Literal["format"] = Field("format", description="an answer in a form, guaranteed by the decoder")
    kind: Literal["json", "json_schema", "regex", "grammar", "options"] = Field("json", description="the kind of form")
    value: str | dict[str, Any] | list[str] = Field(
        "", description="the JSON Schema, the regular expression, the grammar (Lark) or the list of options"
    )
    over: AnyTechnique | None = Field(None, description="what thinks first; without it the form is answered at once")

    @model_validator(mode="after")
    def _value_fits(self) -> Self:
        wanted = {"json": str, "json_schema": (str, dict), "regex": str, "grammar": str, "options": list}[self.kind]
        if not isinstance(self.value, wanted) or (self.kind != "json" and not self.value):
            raise ValueError(t("the value of the format does not go with its kind {kind}", kind=self.kind))
        return self

    @property
    def spelled(self) -> str:
        """The value as the model reads it."""
        if isinstance(self.value, list):
            return ", ".join(self.value)
        return self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)

    def constraint(self) -> Constraint:
        """What the decoder is told."""
        if self.kind == "options":
            choices = "|".join(_literally(option) for option in self.value)
            return Constraint("regex", f"({choices})")
        return Constraint(self.kind, self.spelled)

    def calls(self) -> float:
        return 1 if self.over is None else self.over.calls() + 1

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        demand = say(question.language, "format", self.kind, value=self.spelled)
        if self.over is None:
            text = yield from talk.ask("format", question.asking(f"{question.text}\n\n{demand}"), (), self.constraint())
            return Solution(self._kept(text), text)
        thought = yield from self.over.program(question, talk)
        text = yield from talk.ask("format", question.followed_by(thought.text, demand), (), self.constraint())
        return Solution(self._kept(text), f"{thought.text}\n\n{text}")

    def _kept(self, text: str) -> str:
        """The answer, if it has its form as far as can be seen from here. Raises FledgeError."""
        try:
            if self.kind in ("json", "json_schema"):
                json.loads(text)
            elif self.kind == "options" and text not in self.value:
                raise ValueError(text)
        except ValueError:
            raise FledgeError(
                Problem(
                    t("the answer does not have the form that was asked for"),
                    "format",
                    found=text[:200] or "—",
                    fix=t("allow more tokens, in case it was cut off, or use an engine that holds answers to a form"),
                )
            ) from None
        return text


class Example(Config):
    """A question with its answer; with `reasoning` it shows how one gets there."""

    question: str = Field(min_length=1, description="the question")
    answer: str = Field(min_length=1, description="its answer")
    reasoning: str = Field("", description="the steps that lead to the answer (Wei et al., 2022)")

    @property
    def told(self) -> str:
        """The answer as the model reads it, in the example's own language."""
        if not self.reasoning:
            return self.answer
        language: Language = "zh" if is_chinese(self.reasoning) else "en"
        return say(language, "few_shot", "reasoned", reasoning=self.reasoning, answer=self.answer)


class FewShot(Technique):
    """Examples before the question (Brown et al., 2020), as turns of the conversation or in the text of the question.

    Always the same ones in the same order; `selected_shots` chooses them for each question.
    """

    verbatim: ClassVar[bool] = True

    use: Literal["few_shot"] = Field("few_shot", description="examples before the question")
    examples: list[Example] = Field(min_length=1, description="questions with answers, in the order of showing")
    layout: Literal["turns", "text"] = Field("turns", description="as turns of user and assistant, or as one text")
    task: str = Field("", description="what is to be done, in a sentence")
    over: AnyTechnique | None = Field(None, description="the technique that answers; without one, the model directly")

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        return (yield from inner(self.over).program(self.shown(question), talk))

    def shown(self, question: Question) -> Question:
        """The question with its examples."""
        lang = question.language
        task = say(lang, "few_shot", "task", task=self.task) if self.task else ""
        if self.layout == "turns":
            turns = [
                message
                for example in self.examples
                for message in (Message("user", example.question), Message("assistant", example.told))
            ]
            shown = question.after(turns)
            return shown.under(task) if task else shown
        blocks = [task] if task else []
        for number, example in enumerate(self.examples, start=1):
            pair = [say(lang, "few_shot", "question", text=example.question),
                    say(lang, "few_shot", "answer", text=example.told)]  # fmt: skip
            blocks.append("\n".join([say(lang, "few_shot", "example", number=number), *pair]))
        now = [say(lang, "few_shot", "now"), say(lang, "few_shot", "question", text=question.text),
               say(lang, "few_shot", "answer", text="").rstrip()]  # fmt: skip
        return question.asking("\n\n".join([*blocks, "\n".join(now)])).beginning(question.prefix)


def inner(technique: Technique | None) -> Technique:
    """The technique that another stands over; the model itself where there is none."""
    return technique or Direct()


def _literally(text: str) -> str:
    """A text as a regular expression that the decoder understands."""
    return "".join("\\" + char if char in r"\.^$*+?{}[]()|/-" else char for char in text)
