"""What an engine can do, found out by asking it: small requests, and a look at what comes back.

    found = probe(engine)
    found["seed"].works          # True, False, or None: it could not be told from this model's answers

Nothing is looked up in a list. An option counts when it does what it says: two equal seeds give equal answers and
other seeds other ones, `top_k=1` gives the likeliest token at any temperature, a schema's answer is in the schema.
Errors of the connection (`Unreachable`, `NotAllowed`, `Busy`, `TimedOut`) are raised: they say nothing of the engine.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fledge.core.errors import FledgeError
from fledge.inference.engine import Choice, Constraint, Delta, Engine, Request
from fledge.inference.engines.errors import Busy, CannotDo, NotAllowed, TimedOut, Unreachable
from fledge.records.kinds import Conversation, Message

TEXT = "The quick brown fox"
_NEW = 12
_PATIENCE = 60.0
"""seconds within which a cancelled request has to end"""
_REFUSALS = (Unreachable, NotAllowed, Busy, TimedOut)


@dataclass(frozen=True)
class Capability:
    """One thing that an engine may be able to do. `works` None: the answers did not show it."""

    name: str
    works: bool | None
    found: str = ""
    """why not, in the engine's words"""


@dataclass(frozen=True)
class Capabilities:
    """Everything that was asked, in the order of `CHECKS`."""

    items: tuple[Capability, ...]

    def __getitem__(self, name: str) -> Capability:
        return next(item for item in self.items if item.name == name)

    def __iter__(self) -> Iterator[Capability]:
        return iter(self.items)

    def names(self) -> list[str]:
        """What works."""
        return [item.name for item in self.items if item.works]


def probe(
    engine: Engine, adapters: Sequence[str] = (), tell: Callable[[str], None] = lambda name: None
) -> Capabilities:
    """Ask `engine` for everything. `adapters` are names that it should know; `tell` hears what is asked next."""
    asker = _Asker(engine, tuple(adapters))
    items = []
    for name, check in CHECKS.items():
        tell(name)
        try:
            items.append(Capability(name, check(asker)))
        except _REFUSALS:
            raise
        except FledgeError as error:
            problem = error.problems[0]
            items.append(Capability(name, False, problem.what + (f" ({problem.found})" if problem.found else "")))
    return Capabilities(tuple(items))


class _Asker:
    """An engine, and its plain greedy answer that others are compared with."""

    def __init__(self, engine: Engine, adapters: tuple[str, ...]) -> None:
        self.engine, self.adapters = engine, adapters
        self._greedy: Choice | None = None

    def say(self, **options: Any) -> Choice:
        """The first answer to the text, greedy where nothing else is said."""
        return self.all(**options)[0]

    def all(self, **options: Any) -> tuple[Choice, ...]:
        """All its answers."""
        request = Request(**({"text": TEXT, "max_new_tokens": _NEW, "temperature": 0.0} | options))
        result = self.engine.generate([request])[0]
        if result.error is not None:
            raise result.error
        return result.choices

    @property
    def greedy(self) -> Choice:
        """The likeliest continuation."""
        if self._greedy is None:
            self._greedy = self.say()
        return self._greedy

    def drawn(self, seed: int, **options: Any) -> str:
        """A continuation at temperature 1."""
        return self.say(**({"temperature": 1.0, "seed": seed} | options)).text


def _streaming(ask: _Asker) -> bool:
    deltas = list(ask.engine.stream(Request(text=TEXT, max_new_tokens=_NEW, temperature=0.0)))
    whole = "".join(delta.text for delta in deltas) == ask.greedy.text
    return whole and sum(bool(delta.text or delta.token_ids) for delta in deltas) > 1


def _chat(ask: _Asker) -> bool:
    return bool(ask.say(text=None, messages=(Message("user", TEXT),)).token_ids)


def _token_prompts(ask: _Asker) -> bool:
    return ask.say(text=None, prompt_ids=tuple(ask.engine.encode(TEXT))).text == ask.greedy.text


def _repeats(ask: _Asker) -> bool:
    return ask.say().text == ask.greedy.text


def _seed(ask: _Asker) -> bool | None:
    drawn = [ask.drawn(seed) for seed in (1, 2, 3, 4)]
    if ask.drawn(1) != drawn[0]:
        return False
    return True if len(set(drawn)) > 1 else None


def _many(ask: _Asker) -> bool | None:
    choices = ask.all(n=4, temperature=1.0, seed=5)
    if len(choices) != 4:
        return False
    return True if len({choice.text for choice in choices}) > 1 else None


def _stop(ask: _Asker) -> bool | None:
    text = ask.greedy.text
    if len(text) < 3:
        return None
    stop = text[len(text) // 2 :][:2]
    choice = ask.say(stop=(stop,))
    return choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"


def _cancel(ask: _Asker) -> bool:
    ended = threading.Event()
    reasons: list[str] = []

    def listen(delta: Delta | FledgeError) -> None:
        if isinstance(delta, FledgeError) or delta.finish_reason is not None:
            reasons.append("error" if isinstance(delta, FledgeError) else str(delta.finish_reason))
            ended.set()

    handle = ask.engine.submit(Request(text=TEXT, temperature=0.0, stop_ids=None), listen)
    handle.cancel()
    return ended.wait(_PATIENCE) and reasons[0] == "cancelled"


def _logprobs(ask: _Asker) -> bool:
    items = ask.say(logprobs=3).logprobs
    return bool(items) and all(
        item.logprob <= 1e-6
        and len(item.top) >= 1
        and abs(item.top[0][1] - item.logprob) < 1e-3  # greedy: the token itself is the likeliest
        and sum(2.718281828**value for _, value in item.top) <= 1.001
        for item in items
    )


def _prompt_logprobs(ask: _Asker) -> bool:
    request = Request(text=TEXT, max_new_tokens=1, temperature=0.0, prompt_logprobs=2)
    result = ask.engine.generate([request])[0]
    if result.error is not None:
        raise result.error
    read = result.prompt_logprobs
    return len(read) == result.prompt_tokens > 1 and read[0] is None and all(item is not None for item in read[1:])


def _score(ask: _Asker) -> bool:
    prompt = ask.engine.encode(TEXT)
    (other,) = ask.engine.score([prompt], [prompt])  # where there is no way, this says so
    said = ask.say(text=None, prompt_ids=tuple(prompt), logprobs=1)
    if any(id < 0 for id in said.token_ids):
        return False
    (likely,) = ask.engine.score([prompt], [said.token_ids])
    agrees = abs(likely.total - sum(item.logprob for item in said.logprobs)) < 0.05 * len(said.token_ids)
    return agrees and all(likely.greedy) and len(other.logprobs) == len(prompt)


def _logit_bias(ask: _Asker) -> bool | None:
    wanted = next((id for id in ask.engine.encode(TEXT)[::-1] if ask.engine.decode([id])), None)
    if wanted is None:
        return None
    return ask.say(logit_bias={wanted: 100.0}, max_new_tokens=1).text == ask.engine.decode([wanted])


def _cut(**options: Any) -> Callable[[_Asker], bool]:
    """Options that leave the likeliest token only: any draw is greedy then."""

    def check(ask: _Asker) -> bool:
        return all(ask.drawn(seed, temperature=1.5, **options) == ask.greedy.text for seed in (1, 2, 3))

    return check


def _penalty(name: str, value: float) -> Callable[[_Asker], bool | None]:
    """A penalty that is far too high changes an answer that repeats itself."""

    def check(ask: _Asker) -> bool | None:
        plain = ask.say(max_new_tokens=48)
        if ask.say(max_new_tokens=48, **{name: value}).text != plain.text:
            return True
        return None if len(set(plain.token_ids)) == len(plain.token_ids) else False

    return check


def _json(text: str) -> bool:
    """JSON, or the beginning of some."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return bool(text.strip()) and (error.pos >= len(text.rstrip()) or "Unterminated" in error.msg)
    return True


_ENUM = ["red-7", "blue-8"]
_KINDS: Mapping[str, tuple[Constraint, Callable[[str], bool]]] = {
    "json": (Constraint("json"), _json),
    "json_schema": (
        Constraint("json_schema", json.dumps({"enum": _ENUM})),
        lambda text: text.strip() in [json.dumps(word) for word in _ENUM],
    ),
    "regex": (Constraint("regex", "(yes|no)-[0-9]{3}"), lambda text: bool(re.fullmatch("(yes|no)-[0-9]{3}", text))),
    "grammar": (Constraint("grammar", 'start: ("left" | "right") "!"'), lambda text: text in ("left!", "right!")),
}


def _constraint(kind: str) -> Callable[[_Asker], bool]:
    constraint, good = _KINDS[kind]
    return lambda ask: good(ask.say(constraint=constraint, max_new_tokens=24).text)


def _best_of(ask: _Asker) -> bool | None:
    """The likeliest of six by its mean log-probability, for two seeds: by chance once in 36."""
    shown = False
    for seed in (3, 4):
        few = ask.all(best_of=6, temperature=1.0, seed=seed, logprobs=0)[0]
        each = [_mean(choice) for choice in ask.all(n=6, temperature=1.0, seed=seed, logprobs=0)]
        if not few.logprobs or _mean(few) < max(each) - 1e-4:
            return False
        shown = shown or len(set(each)) > 1
    return True if shown else None


def _mean(choice: Choice) -> float:
    return sum(item.logprob for item in choice.logprobs) / max(len(choice.logprobs), 1)


def _beams(ask: _Asker) -> bool | None:
    """Eight beams find a likelier text of the same length than the greedy one, where there is one."""
    options = {"logprobs": 0, "stop_ids": ()}
    plain, found = ask.say(**options), ask.say(beams=8, **options)
    if not found.logprobs or len(found.token_ids) != len(plain.token_ids) or _mean(found) < _mean(plain) - 1e-4:
        return False
    return True if _mean(found) > _mean(plain) + 1e-4 else None


def _adapters(ask: _Asker) -> bool | None:
    """One that it knows answers; one that it does not know is refused (an engine that ignores names answers)."""
    if not ask.adapters:
        return _refuses(ask) and None
    return bool(ask.say(adapter=ask.adapters[0]).token_ids) and _refuses(ask)


def _refuses(ask: _Asker) -> bool:
    try:
        ask.say(adapter="there-is-no-such-adapter")
    except (*_REFUSALS, CannotDo):
        raise
    except FledgeError as error:
        if "adapter" in error.problems[0].where or "there-is-no-such-adapter" in str(error):
            return True
        raise
    return False


def _embeddings(ask: _Asker) -> bool:
    one, same, other = ask.engine.embed([TEXT, TEXT, "你好，世界"])
    near = max(abs(a - b) for a, b in zip(one, same, strict=True))
    return len(one) == len(other) > 1 and near < 1e-3 < max(abs(a - b) for a, b in zip(one, other, strict=True))


def _reward(ask: _Asker) -> bool:
    turns = (Message("user", TEXT), Message("assistant", "Yes."))
    return len(ask.engine.reward([Conversation(turns)])) == 1


def _tokens(ask: _Asker) -> bool:
    text = f"{TEXT}, 你好 👋"
    ids = ask.engine.encode(text)
    return ask.engine.decode(ids) == text and ask.engine.count(Request(prompt_ids=tuple(ids))) == len(ids)


def _whole(ask: _Asker) -> bool:
    """An answer that holds halves of characters shows none: asked over several draws."""
    texts = [ask.drawn(seed) for seed in (1, 2, 3)]
    streamed = [
        "".join(d.text for d in ask.engine.stream(Request(text=TEXT, max_new_tokens=_NEW, seed=seed)))
        for seed in (1, 2, 3)
    ]
    return texts == streamed


CHECKS: dict[str, Callable[[_Asker], bool | None]] = {
    "text": lambda ask: bool(ask.greedy.token_ids),
    "chat": _chat,
    "token prompts": _token_prompts,
    "tokens": _tokens,
    "streaming": _streaming,
    "stream = whole": _whole,
    "greedy repeats": _repeats,
    "cancel": _cancel,
    "n": _many,
    "seed": _seed,
    "stop": _stop,
    "top_k": _cut(top_k=1),
    "top_p": _cut(top_p=1e-6),
    "min_p": _cut(min_p=1.0),
    "repetition_penalty": _penalty("repetition_penalty", 9.0),
    "presence_penalty": _penalty("presence_penalty", 2.0),
    "frequency_penalty": _penalty("frequency_penalty", 2.0),
    "logit_bias": _logit_bias,
    "logprobs": _logprobs,
    "prompt_logprobs": _prompt_logprobs,
    "score": _score,
    "best_of": _best_of,
    "beams": _beams,
    "json": _constraint("json"),
    "json_schema": _constraint("json_schema"),
    "regex": _constraint("regex"),
    "grammar": _constraint("grammar"),
    "adapters": _adapters,
    "embeddings": _embeddings,
    "reward": _reward,
}
"""What is asked, by name."""

MARKS = {True: "✓", False: "–", None: "?"}


def matrix(found: Mapping[str, Capabilities]) -> list[list[str]]:
    """A table: a header with the engines' names, then a row for everything that was asked."""
    rows = [["", *found]]
    return rows + [[name, *(MARKS[item[name].works] for item in found.values())] for name in CHECKS]


def markdown(found: Mapping[str, Capabilities]) -> str:
    """The table for a page."""
    head, *rows = matrix(found)
    named = [[f"`{name}`" if "_" in name else name, *cells] for name, *cells in rows]
    lines = [head, ["---"] + [":-:"] * len(found), *named]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
