"""The fifth noun. An engine reads and writes text: `generate`, `stream`, `score`, `reward`, `embed`.

Roll-outs, evaluation, the server and the chat page use nothing else, so that the engine behind them may be our own
(`native.py`) or any other. This module holds the words of that conversation and imports nothing heavy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t

if TYPE_CHECKING:
    from fledge.records.kinds import Conversation, Message

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled"]


class PromptTooLong(FledgeError):
    """The prompt leaves no room in the model's context."""


@dataclass(frozen=True)
class Constraint:
    """What an answer must be: any JSON, JSON of a schema, a match of a regular expression, a word of a grammar."""

    kind: Literal["json", "json_schema", "regex", "grammar"]
    value: str = ""
    """the schema as JSON text, the expression, or the grammar in Lark's notation; empty for any JSON"""


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it. Exactly one of `messages`, `text`, `prompt_ids` is given.

    Raises FledgeError when a value is out of its range.
    """

    messages: tuple[Message, ...] | None = None
    """a conversation: rendered with the model's own chat template, its end of turn stops the answer"""
    text: str | None = None
    """plain text; a spelling of a control token in it stays plain text"""
    prompt_ids: tuple[int, ...] | None = None
    """token ids as they are"""
    max_new_tokens: int | None = None
    """None: as many as the context holds"""
    n: int = 1
    """how many answers to sample from the same prompt"""
    temperature: float = 1.0
    """0 takes the likeliest token"""
    top_k: int = 0
    """keep the k likeliest tokens; 0 keeps all"""
    top_p: float = 1.0
    """keep the likeliest tokens that together reach this mass (Holtzman et al., 2020)"""
    min_p: float = 0.0
    """keep tokens at least this fraction as likely as the likeliest"""
    repetition_penalty: float = 1.0
    """divides (or, below zero, multiplies) the logits of tokens seen in prompt or answer (Keskar et al., 2019)"""
    presence_penalty: float = 0.0
    """subtracted once from the logit of every token that the answer holds already"""
    frequency_penalty: float = 0.0
    """subtracted for every time that the answer holds the token already"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """added to the logits of these token ids; -inf forbids one"""
    seed: int | None = None
    """the same seed and prompt give the same draw whatever else is in the batch; None draws one"""
    stop: tuple[str, ...] = ()
    """text at which the answer ends; it is not part of the answer"""
    stop_ids: tuple[int, ...] | None = None
    """token ids that end the answer; None takes the model's own, () none at all"""
    logprobs: int | None = None
    """with every token its log-probability and those of this many likeliest tokens; None: neither"""
    prompt_logprobs: int | None = None
    """the same for the tokens of the prompt (`Result.prompt_logprobs`)"""
    best_of: int | None = None
    """sample this many answers and return the `n` whose tokens are likeliest on average; None: `n`"""
    beams: int = 1
    """beam search with this many beams instead of sampling; 1: none"""
    length_penalty: float = 1.0
    """beam search divides the log-probability of an answer by its length to this power"""
    constraint: Constraint | None = None
    """what the answer must be; None: anything"""
    adapter: str = ""
    """the name of a LoRA adapter that the engine knows; "": the model itself"""
    speculate: bool = True
    """whether tokens may be guessed and checked together where the engine can; the answers' distribution is the same"""

    def __post_init__(self) -> None:
        problems = [
            Problem(t("a request has exactly one of messages, text and prompt_ids"))
            for given in [sum(value is not None for value in (self.messages, self.text, self.prompt_ids))]
            if given != 1
        ]
        for name, allowed, good in (
            ("max_new_tokens", "≥ 1", self.max_new_tokens is None or self.max_new_tokens >= 1),
            ("n", "1 … 128", 1 <= self.n <= 128),
            ("temperature", "≥ 0", 0 <= self.temperature < float("inf")),
            ("top_k", "≥ 0", self.top_k >= 0),
            ("top_p", "0 < top_p ≤ 1", 0 < self.top_p <= 1),
            ("min_p", "0 … 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "> 0", 0 < self.repetition_penalty < float("inf")),
            ("presence_penalty", "-2 … 2", -2 <= self.presence_penalty <= 2),
            ("frequency_penalty", "-2 … 2", -2 <= self.frequency_penalty <= 2),
            ("logit_bias", "< ∞", all(bias < float("inf") for bias in self.logit_bias.values())),
            ("logprobs", "0 … 20", self.logprobs is None or 0 <= self.logprobs <= 20),
            ("stop", t("texts that are not empty"), all(self.stop)),
            ("prompt_logprobs", "0 … 20", self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20),
            ("best_of", f"{self.n} … 128", self.best_of is None or self.n <= self.best_of <= 128),
            ("beams", "1 … 32", 1 <= self.beams <= 32),
            ("n", t("at most as many as there are beams"), self.beams == 1 or self.n <= self.beams),
            ("best_of", t("none with beams"), self.beams == 1 or self.best_of in (None, self.n)),
            ("length_penalty", "-10 … 10", -10 <= self.length_penalty <= 10),
        ):
            if not good:
                problems.append(
                    Problem(
                        t("{name} is out of range", name=name), name, found=repr(getattr(self, name)), allowed=allowed
                    )
                )
        if problems:
            raise FledgeError(*problems)


@dataclass(frozen=True)
class TokenLogprob:
    """A sampled token, its log-probability (natural, fp32) under the model, and the likeliest alternatives.

    The model's own distribution is meant: before penalties, bias, temperature and the cuts of top-k, top-p, min-p.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What one answer of a request gained. `finish_reason` is set on its last delta."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0


@dataclass(frozen=True)
class Choice:
    """One whole answer. `token_ids` include the token that ended it; `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Result:
    """The answers to one request (`n` of them), or the error that this request ended with."""

    choices: tuple[Choice, ...] = ()
    prompt_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """of every token of the prompt, where asked for; the first has none"""
    error: FledgeError | None = None

    @property
    def choice(self) -> Choice:
        """The first answer; raises the request's error when it had one."""
        if self.error is not None:
            raise self.error
        return self.choices[0]

    @property
    def text(self) -> str:
        """The first answer's text; raises the request's error when it had one."""
        return self.choice.text


@dataclass(frozen=True)
class Scored:
    """How likely a continuation is. `logprobs[i]` is the natural log-probability of its token i, in fp32."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    """whether token i is the model's first choice"""

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation."""
        return sum(self.logprobs)


class Handle(Protocol):
    """A request on its way."""

    prompt_tokens: int

    def cancel(self) -> None:
        """Stop it: every unfinished answer ends with the reason "cancelled". Any thread may call this, any time."""


Listen = Callable[[Delta | FledgeError], None]
"""Hears every delta of a request in order, or the error that ends it; called in the engine's thread."""


def told(listen: Listen, delta: Delta | FledgeError) -> bool:
    """Whether a listener took it. A listener is the asker's code in the engine's thread: whatever it raises (its event
    loop is closed, its page is gone, a bug) goes to the log and is to end its own request, never those of others."""
    try:
        listen(delta)
    except Exception:
        log.exception("a listener failed")
        return False
    return True


class Engine(Protocol):
    """Whatever reads and writes text. All methods may be called from any thread."""

    context: int
    """the most tokens that a prompt and its answer may have together"""

    def submit(self, request: Request, listen: Listen) -> Handle:
        """Start a request. Raises FledgeError when the request cannot be (an empty prompt, one too long, …)."""

    def count(self, request: Request) -> int:
        """The tokens of a request's prompt. Raises what `submit` would raise."""

    def stream(self, request: Request) -> Iterator[Delta]:
        """The deltas of a request as they come. Closing the iterator cancels it; an error is raised from it."""

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All answers, in the order of the requests. An error is the result of its own request only."""

    def score(self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[Scored]:
        """The log-probabilities of each continuation after its prompt (fp32)."""

    def reward(self, conversations: Sequence[Conversation]) -> list[float]:
        """The reward model's score of each conversation."""

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """The mean of the last hidden states of each text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: control spellings stay text, no special tokens are added."""

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; with `special` control tokens are spelled out, else left out."""

    def close(self) -> None:
        """Stop working and free the memory; requests on their way end as cancelled."""
