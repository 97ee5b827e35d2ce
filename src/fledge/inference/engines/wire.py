"""Requests as JSON bodies and JSON replies as deltas: OpenAI's chat and completions, streamed or whole.

Token ids. Where a server names its tokens by id (vLLM, llama.cpp, fledge), deltas hold those. Elsewhere a token is
known by its text only, or only counted; it then has a negative id of our own (`Spellings`), which no model has, so that
numbers of tokens stay right and `decode` gives the text back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fledge.core.errors import Problem
from fledge.core.language import t
from fledge.inference.engine import Delta, FinishReason, Request, TokenLogprob
from fledge.inference.engines.dialects import Body, Dialect
from fledge.inference.engines.errors import Failed

NAMELESS = -1
"""the id of a token of which only its existence is known"""
_REASONS: dict[str, FinishReason] = {"length": "length", "abort": "cancelled", "cancelled": "cancelled"}
_PREFIX = "token_id:"


class Spellings:
    """Texts of tokens: of ids that the server named, and of the negative ids that we gave to mere texts."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._texts: dict[int, str] = {NAMELESS: ""}
        self._lock = threading.Lock()

    def id(self, text: str) -> int:
        """The id of a token that is known by its text: a model's own where it is spelled "token_id:7"."""
        if text.startswith(_PREFIX) and text[len(_PREFIX) :].isdecimal():
            return int(text[len(_PREFIX) :])
        with self._lock:
            if text not in self._ids:
                self._ids[text] = -2 - len(self._ids)
                self._texts[self._ids[text]] = text
            return self._ids[text]

    def text(self, id: int) -> str | None:
        """The text of an id, where it has been seen."""
        return self._texts.get(id)

    def remember(self, id: int, text: str) -> None:
        """That a model's token is spelled so."""
        with self._lock:
            self._texts[id] = text


def address(request: Request) -> str:
    """The path below /v1 that a request goes to."""
    return "chat/completions" if request.messages is not None else "completions"


def body(request: Request, index: int | None, model: str, dialect: Dialect, room: int | None) -> Body:
    """A request as the server wants it. `index`: one answer of several, asked for alone; `room`: see `Dialect.endless`.

    Options are sent even where they are neutral: servers have defaults of their own (llama.cpp: top_k 40)."""
    key = dialect.options
    values: Body = {"model": request.adapter or model}
    if request.messages is not None:
        values["messages"] = [message.to_dict() for message in request.messages]
    else:
        values["prompt"] = request.text if request.prompt_ids is None else list(request.prompt_ids)
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if name in key:
            values[key[name]] = getattr(request, name)
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(request, name):
            values[key[name]] = getattr(request, name)
    if request.max_new_tokens is not None or room is not None:
        values[key["max_new_tokens"]] = request.max_new_tokens or room
    elif dialect.endless == "null" and request.messages is None:
        values[key["max_new_tokens"]] = None
    if request.logit_bias:
        values[key["logit_bias"]] = {str(id): bias for id, bias in request.logit_bias.items()}
    if request.stop:
        values["stop"] = list(request.stop)
    if request.n > 1 and index is None:
        values["n"] = request.n
    if request.seed is not None:
        values["seed"] = _seed(request.seed, index)
    if request.stop_ids is not None:
        values[key["ignore_eos"]] = True
        if request.stop_ids:
            values[key["stop_ids"]] = list(request.stop_ids)
    if request.constraint is not None:
        values |= dialect.spell(request.constraint)
    if request.beams > 1:
        values |= {key["beams"]: request.beams, "length_penalty": request.length_penalty}
    if request.best_of is not None:
        values[key["best_of"]] = request.best_of
    return values | _logprobs(request, dialect.fewest) | dialect.ids


def _logprobs(request: Request, fewest: int) -> Body:
    if request.logprobs is None:
        return {}
    count = max(request.logprobs, fewest)
    return {"logprobs": count} if request.messages is None else {"logprobs": True, "top_logprobs": count}


def _seed(seed: int, index: int | None) -> int:
    """The seed of one answer of several: the first keeps the request's own."""
    return seed if not index else (seed + index * 0x9E3779B97F4A7C15) % (1 << 31)


class Reading:
    """One reply as it comes: its chunks become deltas. The last delta of an answer waits for the numbers of tokens."""

    def __init__(
        self, spellings: Spellings, first: int, count: int, likeliest: int = 0, alternatives: int | None = None
    ) -> None:
        """The reply holds `count` answers; they are the request's from number `first` on. `likeliest`: how many were
        asked for beside each token of the prompt; `alternatives`: beside those of the answers."""
        self.prompt_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        self._spellings, self._first, self._count, self._likeliest = spellings, first, count, likeliest
        self._alternatives = alternatives
        self._tokens = 0
        self._written: int | None = None
        self._ends: dict[int, FinishReason] = {}

    def take(self, chunk: Mapping[str, Any]) -> list[Delta]:
        """The deltas of one chunk (or of a whole reply). Raises Failed when it is not what such a server says."""
        try:
            if usage := chunk.get("usage"):
                self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
                self._written = int(usage.get("completion_tokens") or 0)
            deltas = [self._delta(choice) for choice in chunk.get("choices") or ()]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise unreadable(chunk, error) from None
        return [delta for delta in deltas if delta.text or delta.token_ids or delta.logprobs]

    def end(self) -> list[Delta]:
        """The last deltas. Raises Failed when the reply broke off."""
        missing = self._count - len(self._ends)
        if missing:
            raise Failed(Problem(t("the server broke the answer off"), found=t("{n} unfinished", n=missing)))
        unnamed = max((self._written or 0) - self._tokens, 0) if self._count == 1 else 0
        return [
            Delta(token_ids=(NAMELESS,) * unnamed, finish_reason=reason, index=index)
            for index, reason in sorted(self._ends.items())
        ]

    def _delta(self, choice: Mapping[str, Any]) -> Delta:
        index = self._first + int(choice.get("index") or 0)
        inner = choice.get("delta") or choice.get("message") or {}
        text = choice.get("text") or inner.get("content") or ""
        logprobs = self._read(choice.get("logprobs") or {})
        ids = choice.get("token_ids") or [p.id for p in logprobs]
        if choice.get("finish_reason"):
            self._ends[index] = _REASONS.get(choice["finish_reason"], "stop")
        if choice.get("prompt_logprobs"):
            self.prompt_logprobs = tuple(self._prompt(row) for row in choice["prompt_logprobs"])
        self._tokens += len(ids)
        return Delta(str(text), tuple(map(int, ids)), None, logprobs, index)

    def _read(self, value: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
        """Log-probabilities as chats have them (`content`), or as completions (parallel lists)."""
        if rows := value.get("content"):
            return tuple(
                TokenLogprob(
                    *self._row(row), tuple(map(self._row, (row.get("top_logprobs") or ())[: self._alternatives]))
                )
                for row in rows
            )
        tokens = value.get("tokens") or ()
        tops: Iterable[Mapping[str, float] | None] = value.get("top_logprobs") or [None] * len(tokens)
        return tuple(
            TokenLogprob(self._spellings.id(token), float(number), self._ranked(top or {}))
            for token, number, top in zip(tokens, value.get("token_logprobs") or (), tops, strict=True)
            if number is not None
        )

    def _row(self, row: Mapping[str, Any]) -> tuple[int, float]:
        if row.get("id") is None:
            return self._spellings.id(row["token"]), float(row["logprob"])
        self._spellings.remember(int(row["id"]), row["token"])
        return int(row["id"]), float(row["logprob"])

    def _ranked(self, top: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
        return tuple(
            sorted(((self._spellings.id(token), float(value)) for token, value in top.items()), key=_by_value)
        )[: self._alternatives]

    def _prompt(self, row: Mapping[str, Any] | None) -> TokenLogprob | None:
        """vLLM's {id: {"logprob", "rank"}}: the prompt's own token comes first, whatever its rank."""
        if row is None:
            return None
        cells = [(int(id), float(cell["logprob"]), cell.get("rank") or self._likeliest + 1) for id, cell in row.items()]
        top = [(id, value) for id, value, rank in cells if rank <= self._likeliest]
        return TokenLogprob(*cells[0][:2], tuple(sorted(top, key=_by_value)))


def _by_value(item: tuple[int, float]) -> float:
    return -item[1]


def unreadable(value: object, error: Exception | str) -> Failed:
    """The error for a reply that makes no sense."""
    text = repr(value)
    shown = text if len(text) <= 200 else text[:199] + "…"
    return Failed(Problem(t("the server's reply cannot be read: {error}", error=str(error)), found=shown))


def echoed(reply: Mapping[str, Any], prompt: int, wanted: Sequence[int]) -> tuple[list[float], list[bool]] | None:
    """Log-probabilities and "is the likeliest" of the tokens after `prompt` in a completion with `echo`; None when the
    server gave none."""
    logprobs = (reply.get("choices") or [{}])[0].get("logprobs") or {}
    values = (logprobs.get("token_logprobs") or [])[prompt : prompt + len(wanted)]
    tops = (logprobs.get("top_logprobs") or [])[prompt : prompt + len(wanted)]
    if len(values) < len(wanted) or len(tops) < len(wanted) or None in values:
        return None
    greedy = [value >= max((top or {}).values(), default=float("inf")) for value, top in zip(values, tops, strict=True)]
    return [float(value) for value in values], greedy
