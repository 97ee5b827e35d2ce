"""Preferences as pairs of token rows, and how often a score puts the better answer first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.data.tokens.batches import Pair, padded
from fledge.records.chat import ChatRenderer, Rendered
from fledge.records.kinds import Preference
from fledge.training.objective import Batch, as_batch

Z95 = 1.959963984540054
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Contest:
    """One pair as tokens, the language of its prompt, and both answers' lengths in characters."""

    pair: Pair
    language: str
    characters: tuple[int, int]

    @property
    def tokens(self) -> tuple[float, float]:
        """Tokens of the two answers that count."""
        return sum(self.pair.chosen.weights), sum(self.pair.rejected.weights)


def contests(renderer: ChatRenderer, preferences: Iterable[Preference], max_length: int) -> Iterator[Contest]:
    """Every pair of every preference. A prompt that leaves no room for its longest answer loses its beginning."""
    for preference in preferences:
        pairs = list(preference.pairs())
        contents = list(dict.fromkeys(answer.content for pair in pairs for answer in pair))
        if not pairs:
            continue
        prompt, tails = renderer.render_answers(preference.prompt, contents)
        answers = dict(zip(contents, tails, strict=True))
        room = max(1, max_length - max(map(len, tails)))
        prompt = prompt[-room:]
        for better, worse in pairs:
            rows = [
                Rendered(prompt + answers[a.content], [0.0] * len(prompt) + [1.0] * len(answers[a.content]))
                for a in (better, worse)
            ]
            characters = (len(better.content), len(worse.content))
            yield Contest(Pair(*rows, weight=1 / len(pairs)), preference.language, characters)


def ask(contests: Sequence[Contest], pad_id: int, scores: Callable[[Batch], Tensor], device: str = "cpu") -> Tensor:
    """`scores(rows)` → (n,) of both answers of every contest, batched by length: (N, 2), in the contests' order."""
    rows = [row for contest in contests for row in (contest.pair.chosen, contest.pair.rejected)]
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids), index))
    found = torch.zeros(len(rows), dtype=torch.float64)
    while order:
        longest = len(rows[order[-1]].ids)
        taken = order[-max(1, TOKENS_AT_ONCE // longest) :]
        del order[-len(taken) :]
        batch = as_batch(padded([rows[index] for index in taken], longest, pad_id), device)
        with torch.inference_mode():
            found[torch.tensor(taken)] = scores(batch).double().cpu()
    return found.view(-1, 2)


def accuracy(margins: Tensor, contests: Sequence[Contest], name: str = "accuracy") -> dict[str, Any]:
    """How often the better answer scored higher (a tie is half), Wilson's 95 % interval, and the same by language."""
    right = ((margins > 0).double() + 0.5 * (margins == 0).double()).tolist()
    low, high = wilson(sum(right), len(right))
    found: dict[str, Any] = {name: sum(right) / len(right), f"{name}_low": low, f"{name}_high": high}
    for language in sorted({contest.language for contest in contests if contest.language}):
        some = [value for value, contest in zip(right, contests, strict=True) if contest.language == language]
        found[f"{name}_{language}"] = sum(some) / len(some)
    return found


def baselines(logprobs: Tensor, contests: Sequence[Contest]) -> dict[str, Any]:
    """What takes no training: the longer answer, and the answer that the starting model finds likelier.

    `logprobs` (N, 2) are summed log-probabilities; "likelier" compares the sums, "likelier_mean" those a token.
    """
    lengths = torch.tensor([c.characters for c in contests], dtype=torch.float64)
    means = logprobs / torch.tensor([c.tokens for c in contests], dtype=torch.float64)
    return {
        **accuracy(lengths[:, 0] - lengths[:, 1], contests, "longer"),
        **accuracy(logprobs[:, 0] - logprobs[:, 1], contests, "likelier"),
        **accuracy(means[:, 0] - means[:, 1], contests, "likelier_mean"),
    }


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of 95 % for `right` of `n`."""
    if n == 0:
        return 0.0, 1.0
    p, z = right / n, Z95
    centre, shrink = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)
