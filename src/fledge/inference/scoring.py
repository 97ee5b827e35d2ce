"""Probabilities, rewards and vectors of given texts: forward passes without a cache, batched by length.

Continuations of one prompt are read in one row, as branches: prompt ++ first ++ second ++ …, where a branch sees the
prompt and itself (the positions of all branches start behind the prompt). A question with four answers costs its
prompt once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import Scored
from fledge.inference.forward import Forward
from fledge.inference.pooling import Pooling

T = TypeVar("T")
Call = Callable[[Callable[[], T]], T]
"""runs a function in the thread that owns the model"""

_BATCH_TOKENS = 4096
_BATCH_LOGITS = 1 << 26
_ROW_TOKENS = 2048


@dataclass
class _Row:
    """A prompt and the branches that go on from it: (place in the caller's list, tokens)."""

    prompt: list[int]
    branches: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens to read: the last of a branch is only predicted."""
        return len(self.prompt) + sum(len(ids) - 1 for _, ids in self.branches)


def score(
    call: Call[Any], forward: Forward, context: int,
    prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]],
) -> list[Scored]:  # fmt: skip
    """See `Engine.score`."""
    for place, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        if not prompt or not continuation:
            raise FledgeError(Problem(t("a prompt or continuation is empty"), t("item {n}", n=place)))
        check_length(len(prompt) + len(continuation) - 1, context, place)
    found: dict[int, Scored] = {}
    for batch in _batches(_rows(prompts, continuations, forward.takes_positions), forward):
        found |= call(partial(_score, forward, batch))
    return [found[place] for place in range(len(prompts))]


def _rows(
    prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], branching: bool = True
) -> list[_Row]:
    """Rows with at most `_ROW_TOKENS` tokens (or one branch), each prompt once while it fits, sorted by length.

    A model that is told no positions (ALiBi) would take a second branch for further away than it is: there a row has
    one branch.
    """
    finished: list[_Row] = []
    rows: dict[tuple[int, ...], _Row] = {}
    for place, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        key = tuple(prompt)
        row = rows.setdefault(key, _Row(list(prompt)))
        if row.branches and (not branching or row.length + len(continuation) > _ROW_TOKENS):
            finished.append(row)
            row = rows[key] = _Row(list(prompt))
        row.branches.append((place, list(continuation)))
    return sorted([*finished, *rows.values()], key=lambda row: row.length)


def _batches(rows: list[_Row], forward: Forward) -> Iterator[list[_Row]]:
    vocabulary = forward.model.config.get_text_config().vocab_size
    batch: list[_Row] = []
    for row in rows:
        more = [*batch, row]
        read = row.length - min(len(r.prompt) for r in more) + 1
        tokens, logits = len(more) * row.length, len(more) * read * vocabulary
        if batch and (tokens > _BATCH_TOKENS or logits > _BATCH_LOGITS):
            yield batch
            more = [row]
        batch = more
    if batch:
        yield batch


def _score(forward: Forward, batch: list[_Row]) -> dict[int, Scored]:
    width = max(row.length for row in batch)
    first = min(len(row.prompt) for row in batch) - 1  # the first column whose logits are needed
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segments = torch.zeros_like(ids)  # 0 the prompt, 1 … the branches
    wanted: list[tuple[int, int, int, int]] = []  # row, column of the logits, token, place in the caller's list
    for b, row in enumerate(batch):
        column = len(row.prompt)
        ids[b, :column] = torch.tensor(row.prompt)
        positions[b] = torch.arange(width)
        for segment, (place, tokens) in enumerate(row.branches, start=1):
            end = column + len(tokens) - 1
            ids[b, column:end] = torch.tensor(tokens[:-1], dtype=torch.long)
            positions[b, column:end] = torch.arange(end - column) + len(row.prompt)
            segments[b, column:end] = segment
            columns = [len(row.prompt) - 1, *range(column, end)]
            wanted += [(b, c - first, token, place) for c, token in zip(columns, tokens, strict=True)]
            column = end
        segments[b, column:] = -1
    branching = bool((segments > 1).any())  # without, padding on the right needs no mask: nobody looks ahead
    logits = forward.model(
        input_ids=ids.to(forward.device),
        attention_mask=_branch_mask(segments).to(forward.device) if branching else None,
        use_cache=False,
        logits_to_keep=torch.arange(first, width, device=forward.device),
        **({"position_ids": positions.to(forward.device)} if branching else {}),
    ).logits.float()
    rows, columns, tokens, places = torch.tensor(wanted, device=forward.device).T
    norms, best = logits.logsumexp(-1), logits.argmax(-1)  # (B, columns)
    logprobs = (logits[rows, columns, tokens] - norms[rows, columns]).tolist()
    greedy = (best[rows, columns] == tokens).tolist()
    found: dict[int, tuple[list[float], list[bool]]] = {}
    for place, logprob, likeliest in zip(places.tolist(), logprobs, greedy, strict=True):
        lists = found.setdefault(place, ([], []))
        lists[0].append(logprob)
        lists[1].append(likeliest)
    return {place: Scored(tuple(logprobs), tuple(flags)) for place, (logprobs, flags) in found.items()}


def _branch_mask(segments: Tensor) -> Tensor:
    """(B, 1, T, T), True = seen: what came before, in the prompt or in the same branch."""
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]


def reward(call: Call[Any], forward: Forward, context: int, rows: Sequence[Sequence[int]]) -> list[float]:
    """The reward head's value at the last token of every row."""
    if forward.writes:
        raise FledgeError(
            Problem(t("this model is not a reward model"), fix=t("give a folder made by the stage train.reward"))
        )
    pad = forward.model.config.get_text_config().pad_token_id  # transformers takes the last token that is not padding

    def run(ids: Tensor, mask: Tensor) -> list[float]:
        values: list[float] = forward.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
        return values

    return _by_length(call, forward.device, context, rows, run, pad or 0, alone=pad is None)


def embed(
    call: Call[Any], body: Any, context: int, rows: Sequence[Sequence[int]], pooling: Pooling | None = None
) -> list[list[float]]:  # fmt: skip
    """One vector a row from the last hidden states of `body`, a model without its head. See `Engine.embed`."""
    pool = pooling or Pooling()
    options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}

    def run(ids: Tensor, mask: Tensor) -> list[list[float]]:
        vectors: list[list[float]] = pool(
            body(input_ids=ids, attention_mask=mask, **options).last_hidden_state, mask
        ).tolist()
        return vectors

    return _by_length(call, body.device, context, rows, run, pad_of(body))


def body_of(model: Any) -> Any:
    """A model without its head, adapters included: what gives hidden states."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return inner.get_encoder() if inner.config.is_encoder_decoder else inner.base_model


def pad_of(model: Any) -> int:
    """The id that stands behind short rows; families that count positions from behind it need the right one."""
    return int(model.config.get_text_config().pad_token_id or 0)


def _by_length(
    call: Call[Any], device: Any, context: int, rows: Sequence[Sequence[int]],
    run: Callable[[Tensor, Tensor], list[T]], pad: int = 0, alone: bool = False,
) -> list[T]:  # fmt: skip
    """`run(ids (B, T), mask (B, T))` over batches of similar length; its values in the caller's order."""
    for place, row in enumerate(rows):
        if not row:
            raise FledgeError(Problem(t("the text is empty"), t("item {n}", n=place)))
        check_length(len(row), context, place)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    found: dict[int, T] = {}
    while order:
        size = 1
        while not alone and size < len(order) and (size + 1) * len(rows[order[size]]) <= _BATCH_TOKENS:
            size += 1
        places, order = order[:size], order[size:]
        width = len(rows[places[-1]])
        ids = torch.tensor([[*rows[place], *[pad] * (width - len(rows[place]))] for place in places])
        mask = torch.tensor([[1] * len(rows[place]) + [0] * (width - len(rows[place])) for place in places])
        values = call(partial(run, ids.to(device), mask.to(device)))
        found |= zip(places, values, strict=True)
    return [found[place] for place in range(len(rows))]


def check_length(length: int, context: int, place: int) -> None:
    """Raise FledgeError when item `place` of a list is longer than the context."""
    if length > context:
        raise FledgeError(
            Problem(
                t("the text is longer than the model's context"),
                t("item {n}", n=place),
                found=t("{n} tokens", n=length),
                allowed=t("at most {n} tokens", n=context),
            )
        )
