"""How servers spell what OpenAI's API has no word for.

A dialect says which JSON keys a kind of server understands, so that nothing is asked for that it would silently
ignore. It says how to ask, not what works: that is found out by asking (`capabilities.probe`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from fledge.inference.engine import Constraint, Request

Body = dict[str, Any]
Spell = Callable[[Constraint], Body]

_OPENAI = {
    "max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "stop": "stop", "seed": "seed",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty", "logit_bias": "logit_bias",
    "logprobs": "logprobs",
}  # fmt: skip
_VLLM = _OPENAI | {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty"}
_ALWAYS = frozenset({"messages", "text", "prompt_ids", "n", "speculate", "length_penalty", "prompt_logprobs"})
"""fields of a request that are no plain option: they are dealt with by name"""


def _response_format(constraint: Constraint) -> Body:
    """OpenAI's own: any JSON, or JSON of a schema."""
    if constraint.kind == "json":
        return {"response_format": {"type": "json_object"}}
    schema = {"name": "answer", "schema": json.loads(constraint.value), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _structured_outputs(constraint: Constraint) -> Body:
    """vLLM's, for what OpenAI has no word for."""
    if constraint.kind in ("json", "json_schema"):
        return _response_format(constraint)
    return {"structured_outputs": {constraint.kind: constraint.value}}


def _fledge(constraint: Constraint) -> Body:
    if constraint.kind == "json":
        return {"guided_json": True}
    return {f"guided_{constraint.kind.removesuffix('_schema')}": constraint.value}


def _llama_cpp(constraint: Constraint) -> Body:
    """Its own word: `response_format` has no effect on plain completions."""
    return {"json_schema": json.loads(constraint.value) if constraint.kind == "json_schema" else {}}


def _sglang(constraint: Constraint) -> Body:
    return {"regex": constraint.value} if constraint.kind == "regex" else _response_format(constraint)


def _tgi(constraint: Constraint) -> Body:
    value = constraint.value if constraint.kind == "regex" else json.loads(constraint.value)
    return {"response_format": {"type": "regex" if constraint.kind == "regex" else "json", "value": value}}


_JSON = ("json", "json_schema")


@dataclass(frozen=True)
class Dialect:
    """What one kind of server understands."""

    name: str
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(_OPENAI))
    """field of `Request` → JSON key; what is missing, the server does not know"""
    constraints: tuple[str, ...] = _JSON
    spell: Spell = _response_format
    token_prompts: bool = True
    """a prompt may be a list of token ids"""
    many: bool = True
    """several answers (`n`) to one request"""
    ids: Mapping[str, Any] = field(default_factory=dict)
    """what to send so that the reply names its tokens by id"""
    tokenize: str = ""
    """whose way of /tokenize: "vllm", "llama.cpp", "tgi"; "": there is none"""
    scores: str = "echo"
    """how to ask for the prompt's log-probabilities: "prompt_logprobs" (vLLM), "echo" (OpenAI); "": no way"""
    adapters: bool = False
    """an adapter is asked for by its name in place of the model's"""
    fewest: int = 0
    """log-probabilities come with this many alternatives at least: llama.cpp takes 0 for none of it"""
    endless: str = ""
    """what says "as long as the context allows" after plain text: "null" (`max_tokens: null`), "omit"; "": a number"""

    def missing(self, request: Request) -> list[str]:
        """The fields of a request that ask for something and that this server has no word for."""
        asked = [
            f.name for f in fields(Request)
            if f.name not in self.options and f.name not in _ALWAYS and not _neutral(request, f.name)
        ]  # fmt: skip
        known = {"adapter": self.adapters, "stop_ids": request.stop_ids == () and "ignore_eos" in self.options}
        if request.constraint is not None:
            known["constraint"] = request.constraint.kind in self.constraints
        if request.prompt_ids is not None and not self.token_prompts:
            asked.append("prompt_ids")
        if request.prompt_logprobs is not None and self.scores != "prompt_logprobs":
            asked.append("prompt_logprobs")
        return [name for name in asked if not known.get(name, False)]


def _neutral(request: Request, name: str) -> bool:
    default = {f.name: f for f in fields(Request)}[name]
    value = getattr(request, name)
    return not value if name in ("logit_bias", "adapter") else value == default.default


FLEDGE = Dialect(
    "fledge",
    _VLLM | {"ignore_eos": "ignore_eos", "stop_ids": "stop_token_ids", "best_of": "best_of", "beams": "num_beams"},
    ("json", "json_schema", "regex", "grammar"), _fledge,
    ids={"return_token_ids": True, "return_tokens_as_token_ids": True}, tokenize="vllm", scores="prompt_logprobs",
    adapters=True, endless="null",
)  # fmt: skip
VLLM = Dialect(
    "vllm", _VLLM | {"ignore_eos": "ignore_eos", "stop_ids": "stop_token_ids"},
    ("json", "json_schema", "regex", "grammar"), _structured_outputs,
    ids={"return_token_ids": True, "return_tokens_as_token_ids": True}, tokenize="vllm", scores="prompt_logprobs",
    adapters=True, endless="null",
)  # fmt: skip
LLAMA_CPP = Dialect(
    "llama.cpp", _VLLM | {"repetition_penalty": "repeat_penalty", "ignore_eos": "ignore_eos"},
    spell=_llama_cpp, many=False, tokenize="llama.cpp", scores="", fewest=1, endless="omit",
)  # fmt: skip
SGLANG = Dialect(
    "sglang", _VLLM | {"ignore_eos": "ignore_eos", "stop_ids": "stop_token_ids"},
    (*_JSON, "regex"), _sglang, tokenize="vllm", adapters=True, endless="null",
)  # fmt: skip
TENSORRT_LLM = Dialect("tensorrt-llm", _VLLM | {"ignore_eos": "ignore_eos", "stop_ids": "stop_token_ids"}, scores="")
TGI = Dialect(
    "tgi", {k: v for k, v in _OPENAI.items() if k != "logit_bias"}, ("json_schema", "regex"), _tgi,
    token_prompts=False, many=False, tokenize="tgi", scores="",
)  # fmt: skip
OLLAMA = Dialect(
    "ollama", {k: v for k, v in _OPENAI.items() if k != "logit_bias"}, token_prompts=False, many=False, scores="",
)  # fmt: skip
OPENAI = Dialect("openai")

DIALECTS = {d.name: d for d in (FLEDGE, VLLM, LLAMA_CPP, SGLANG, TENSORRT_LLM, TGI, OLLAMA, OPENAI)}
_OWNERS = {
    "fledge": FLEDGE, "vllm": VLLM, "llamacpp": LLAMA_CPP, "sglang": SGLANG, "tensorrt_llm": TENSORRT_LLM,
    "library": OLLAMA,
}  # fmt: skip
_SIGNS = (("/api/version", "version", OLLAMA), ("/props", "default_generation_settings", LLAMA_CPP),
          ("/info", "docker_label", TGI))  # fmt: skip
"""addresses that only one kind of server has, with a key of what it says there"""


def recognise(card: Mapping[str, Any], look: Callable[[str], Any]) -> Dialect:
    """The dialect of a server by its model's card (`/v1/models`), or by an address that only one kind has.

    `look(path)` is the JSON there, None where there is none."""
    if (dialect := _OWNERS.get(str(card.get("owned_by", "")).lower())) is not None:
        return dialect
    for path, key, dialect in _SIGNS:
        said = look(path)
        if isinstance(said, dict) and key in said:
            return dialect
    return OPENAI
