"""Sampling options as JSON has them: one schema for the server's requests and for lines of a batch file."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fledge.core.draft import rule_of
from fledge.core.errors import FledgeError, Problem, did_you_mean
from fledge.core.language import t
from fledge.inference.engine import Constraint, Request
from fledge.records.kinds import Message

Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class SchemaFormat(BaseModel):
    """A JSON Schema as OpenAI wraps it. It is always kept to, `strict` or not."""

    model_config = ConfigDict(extra="forbid")
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer has to be: text, a JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    def constraint(self) -> Constraint | None:
        """The engine's constraint; None for text."""
        if self.type == "json_object":
            return Constraint("json_schema", '{"type": "object"}')
        if self.type == "json_schema" and self.json_schema is None:
            raise FledgeError(Problem(t('"{key}" is missing', key="json_schema"), "response_format"))
        return Constraint("json_schema", json.dumps(self.json_schema.schema_)) if self.json_schema else None


class SamplingOptions(BaseModel):
    """How to go on from a prompt; names and defaults are OpenAI's, with the usual additions."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    max_tokens: int | None = Field(None, ge=1, description="the most new tokens; without it, what the context holds")
    n: int = Field(1, ge=1, le=128, description="answers to sample")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the likeliest token; default 1")
    top_p: float | None = Field(None, gt=0, le=1, description="keep the likeliest tokens of this mass together")
    top_k: int = Field(0, ge=-1, description="keep this many of the likeliest tokens; 0 or -1 keep all")
    min_p: float = Field(0.0, ge=0, le=1, description="keep tokens this fraction as likely as the likeliest")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="above 1 discourages what was said before")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="taken off what the answer holds already")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="taken off for every time it holds it")
    logit_bias: dict[str, float] | None = Field(None, description="added to the logits of these token ids")
    seed: Seed | None = Field(None, description="the same seed gives the same draw")
    stop: str | list[str] | None = Field(None, description="texts that end the answer")
    best_of: int | None = Field(None, ge=1, le=128, description="sample this many and return the n likeliest")
    num_beams: int = Field(1, ge=1, le=32, description="beam search with this many beams instead of sampling")
    length_penalty: float = Field(1.0, description="above 0 beam search prefers longer texts, below 0 shorter ones")
    response_format: ResponseFormat | None = Field(None, description="text, json_object or json_schema")
    guided_json: dict[str, Any] | str | bool | None = Field(None, description="a JSON Schema; true: any JSON")
    guided_regex: str | None = Field(None, description="a regular expression that the answer matches")
    guided_grammar: str | None = Field(None, description="a grammar in Lark's notation that has the answer as a word")
    speculate: bool = Field(True, description="false: no guessing ahead (it changes how fast, not what is likely)")

    def to_request(self, **prompt: Any) -> Request:
        """The engine's request; `prompt` holds messages, text or prompt_ids (and what else the caller sets)."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        bias = self.logit_bias or {}
        for token in bias:
            if not token.isdecimal():
                raise FledgeError(Problem(t("keys of logit_bias are token ids"), "logit_bias", found=token))
        given = {
            "max_new_tokens": self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": {int(token): value for token, value in bias.items()},
            "best_of": self.best_of,
            "beams": self.num_beams,
            "length_penalty": self.length_penalty,
            "constraint": self.constraint(),
            "speculate": self.speculate,
        }
        return Request(
            n=self.n, top_k=max(self.top_k, 0), min_p=self.min_p, repetition_penalty=self.repetition_penalty,
            seed=self.seed, stop=tuple(stop), **(given | prompt),
        )  # fmt: skip

    def constraint(self) -> Constraint | None:
        """What the answer has to be. Raises FledgeError when that is said twice."""
        given: dict[str, Constraint] = {}
        if self.response_format is not None and (wanted := self.response_format.constraint()) is not None:
            given["response_format"] = wanted
        if self.guided_json is True:
            given["guided_json"] = Constraint("json")
        elif self.guided_json not in (None, False):
            schema = self.guided_json if isinstance(self.guided_json, str) else json.dumps(self.guided_json)
            given["guided_json"] = Constraint("json_schema", schema)
        if self.guided_regex is not None:
            given["guided_regex"] = Constraint("regex", self.guided_regex)
        if self.guided_grammar is not None:
            given["guided_grammar"] = Constraint("grammar", self.guided_grammar)
        if len(given) > 1:
            raise FledgeError(Problem(t("an answer can have one constraint only"), ", ".join(given)))
        return next(iter(given.values()), None)


class TextPart(BaseModel):
    """A piece of a message's content. Only text is understood."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of OpenAI's chat format."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str = ""
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def to_message(self) -> Message:
        """The record; several parts of text become one."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        calls = json.dumps(self.tool_calls, ensure_ascii=False) if self.tool_calls else ""
        role = "system" if self.role == "developer" else self.role
        return Message(role, text, name=self.name, tool_calls=calls, tool_call_id=self.tool_call_id)


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """What pydantic found, in our words: the key, what was found, what is allowed."""
    found = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            fix = did_you_mean(key, model.model_fields) if len(item["loc"]) == 1 else ""
            found.append(Problem(t('"{key}" is unknown', key=key), where, fix=fix))
        else:
            value = "" if item["type"] == "missing" else _short(item["input"])
            found.append(Problem(rule_of(item), where, value, str(item.get("ctx", {}).get("expected", ""))))
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
