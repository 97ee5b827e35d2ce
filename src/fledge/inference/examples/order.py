"""What the order of examples does by itself (Lu et al., 2022): the same examples, the same questions, other orders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import Engine
from fledge.inference.examples.example import Example
from fledge.inference.examples.likelihood import likelihoods, shown


@dataclass(frozen=True)
class Item:
    """A question to measure by: its right answer, and the wrong ones among which a model has to find it.

    Without wrong ones the answer counts as right where the model would write exactly it.
    """

    question: str
    answer: str
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class OrderEffect:
    """Accuracy on the same questions behind the same examples, by their order."""

    orders: tuple[tuple[int, ...], ...]
    accuracy: tuple[float, ...]
    """by order, in the order of `orders`"""
    logprob: tuple[float, ...]
    """the right answers' mean log-probability a token, by order"""

    @property
    def mean(self) -> float:
        """The mean accuracy over the orders."""
        return float(np.mean(self.accuracy))

    @property
    def spread(self) -> float:
        """The standard deviation of the accuracy over the orders (of the sample)."""
        return float(np.std(self.accuracy, ddof=1)) if len(self.accuracy) > 1 else 0.0

    @property
    def best(self) -> int:
        """The place in `orders` of the one with the highest accuracy; of equal ones that with the likelier answers."""
        return max(range(len(self.orders)), key=lambda i: (self.accuracy[i], self.logprob[i], -i))

    @property
    def worst(self) -> int:
        """The place of the one with the lowest."""
        return min(range(len(self.orders)), key=lambda i: (self.accuracy[i], self.logprob[i], i))


def order_effect(
    engine: Engine,
    examples: Sequence[Example],
    items: Sequence[Item],
    orders: int = 24,
    seed: int = 0,
    show: Callable[..., str] = shown,
) -> OrderEffect:
    """Ask `items` behind `examples` in at most `orders` different orders: all there are, or so many drawn by the seed,
    the given one among them."""
    if not items or not examples:
        raise FledgeError(Problem(t("there are no examples to choose from") if items else t("there are no questions")))
    drawn = permutations(len(examples), orders, seed)
    accuracy, logprob = [], []
    for order in drawn:
        arranged = [examples[place] for place in order]
        rows = [(arranged, item.question, text) for item in items for text in (item.answer, *item.wrong)]
        means, written = likelihoods(engine, rows, show)
        right = total = 0.0
        at = 0
        for item in items:
            mine = means[at : at + 1 + len(item.wrong)]
            right += mine[0] > max(mine[1:]) if item.wrong else written[at]
            total += mine[0]
            at += len(mine)
        accuracy.append(right / len(items))
        logprob.append(total / len(items))
    return OrderEffect(tuple(drawn), tuple(accuracy), tuple(logprob))


def permutations(n: int, most: int, seed: int) -> list[tuple[int, ...]]:
    """Different orders of n things, the given one first: all n!, or `most` of them."""
    if math.factorial(min(n, 20)) <= most:
        return list(itertools.permutations(range(n)))
    random = np.random.default_rng(seed)
    found = {tuple(range(n)): None}
    while len(found) < most:
        found[tuple(int(place) for place in random.permutation(n))] = None
    return list(found)
