"""A model under examination: its engine, its tokenizer, its chat rendering, and what it weighs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t

if TYPE_CHECKING:
    from fledge.inference.engine import Choice, Engine, Scored
    from fledge.inference.prompting import Outcome, Technique
    from fledge.inference.prompting.tools import Tool
    from fledge.records.chat import ChatRenderer
    from fledge.records.kinds import Message

T = TypeVar("T")
ROWS = 32
"""Rows given to an engine at once. Always the same rows together: scores must not depend on how long a list is."""


@dataclass(frozen=True)
class Named:
    """Which model a stage means, before it is loaded."""

    name: str
    path: Path | str  # its folder, or the address of a server that answers for it
    reward: bool = False  # a reward model: one score an answer
    chat: bool = True  # asked through its chat template; else the prompt is plain text to continue
    shown: bool = True  # False for a reference that the user did not ask to see


@dataclass(frozen=True)
class Subject:
    """A loaded model. `tokenizer` is called as a Hugging Face tokenizer: `tokenizer(text).input_ids`. Of a model at a
    server's address there is the engine alone, and the server writes its chats."""

    name: str
    engine: Engine
    tokenizer: Any
    renderer: ChatRenderer | None
    chat: bool = True
    reward: bool = False
    served: bool = False

    @property
    def chats(self) -> bool:
        """Whether prompts go through the chat template."""
        return self.chat and (self.served or self.renderer is not None)

    def score(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], tell: Callable[[int], None]
    ) -> list[Scored]:
        """Log-probabilities of the continuations; `tell` hears how many more are done."""
        scored: list[Scored] = []
        for rows in chunks(range(len(prompts)), ROWS):
            scored += self.engine.score([prompts[i] for i in rows], [continuations[i] for i in rows])
            tell(len(rows))
        return scored


def chunks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """`rows` in lists of `size`, the last one shorter."""
    chunk: list[T] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def spread(rows: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` rows, evenly spaced: held-out sets lie sorted by source, and their head would be one of them."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def clip(prompt: Sequence[int], continuation: Sequence[int], context: int) -> tuple[list[int], list[int]]:
    """Both as they fit: the left end of the prompt goes first, one token of it stays.

    A model of `context` positions scores context + 1 tokens: it never has to read the last one.
    """
    whole = [*prompt, *continuation][-(context + 1) :]
    kept = max(1, len(whole) - len(continuation))
    return whole[:kept], whole[kept:]


def need_renderer(subject: Subject) -> ChatRenderer:
    """The subject's chat rendering. Raises FledgeError when its folder has no chat template."""
    if subject.renderer is None:
        raise FledgeError(
            Problem(
                t("{name} has no chat template, which this task needs", name=subject.name),
                fix=t("train it on conversations, or leave it out of this task's stage"),
            )
        )
    return subject.renderer


def answer(
    subject: Subject,
    prompts: Sequence[str | tuple[Message, ...]],
    settings: dict[str, Any],
    tell: Callable[[int], None],
) -> list[Choice]:
    """What the model says: to a chat through its own template, else as the continuation of the last message's text."""
    from fledge.inference.engine import Request
    from fledge.records.kinds import Message

    def request(prompt: str | tuple[Message, ...]) -> Request:
        if subject.chats:
            messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
            return Request(messages=messages, **settings)
        return Request(text=prompt if isinstance(prompt, str) else prompt[-1].content, **settings)

    choices: list[Choice] = []
    for rows in chunks(prompts, ROWS):
        choices += [result.choice for result in subject.engine.generate([request(row) for row in rows])]
        tell(len(rows))
    return choices


def solve(
    subject: Subject,
    prompts: Sequence[str | tuple[Message, ...]],
    technique: Technique,
    settings: dict[str, Any],
    seed: int,
    tell: Callable[[int], None],
    tools: Mapping[str, Tool] | None = None,
) -> list[Outcome]:
    """What the model finds by a prompting technique. The rows of a chunk go on side by side, round by round, each with
    a seed of its own: what one of them gives does not depend on the others."""
    from fledge.inference.engine import Request
    from fledge.inference.prompting import Question, drive, together

    outcomes: list[Outcome] = []
    for rows in chunks(enumerate(prompts), ROWS):
        programs = []
        for n, prompt in rows:
            base = Request(text="-", seed=(seed + n) % 2**31, **settings)
            programs.append(technique.solving(Question.of(prompt, chat=subject.chats), base, tools=tools))
        outcomes += drive(subject.engine, together(programs))
        tell(len(rows))
    return outcomes


def open_subject(named: Named, dtype: str, device: str) -> Subject:
    """Load a model with the one of our own engines that it needs, or connect to the server that answers for it."""
    from fledge.inference.opening import open_engine

    if isinstance(named.path, str):
        return Subject(named.name, open_engine(named.path), None, None, named.chat, served=True)
    engine = open_engine(named.path, dtype=dtype, device=device, reward=named.reward)
    renderer = engine.renderer if engine.renderer and engine.renderer.template else None
    return Subject(named.name, engine, engine.tokenizer, renderer, named.chat, named.reward)


def weights_of(folder: Path) -> tuple[int, int]:
    """(parameters, bytes of the safetensors) of a model folder; an adapter counts its own weights and its base's.

    Scales and zero points of quantised weights are overhead, not parameters.
    """
    from safetensors import safe_open

    parameters = size = 0
    for file in sorted(folder.glob("*.safetensors")):
        size += file.stat().st_size
        with safe_open(str(file), framework="np") as tensors:
            for name in sorted(tensors.keys()):
                if name.endswith("weight_packed"):  # several small numbers in one int32: the true shape stands beside
                    continue
                if name.endswith("weight_shape"):
                    parameters += _product(int(n) for n in tensors.get_tensor(name))
                elif not name.endswith(("_scale", "_zero_point", "_g_idx", "_observer")):
                    parameters += _product(tensors.get_slice(name).get_shape())
    if (folder / "adapter_config.json").is_file():
        from fledge.models.load import base_of

        base = weights_of(base_of(folder))
        return parameters + base[0], size + base[1]
    return parameters, size


def _product(numbers: Iterable[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total
