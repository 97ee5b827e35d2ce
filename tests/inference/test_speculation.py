"""Guessing changes how fast an answer comes, never what it is: token for token, or in distribution."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fledge.inference.engine import Request
from fledge.inference.sampling import Sampling, choose, probabilities, sample
from fledge.inference.speculation import Draft, Pace, PromptLookup, accept, check

VOCABULARY = 5
TARGET = np.random.default_rng(1).normal(0, 1.5, (VOCABULARY, VOCABULARY)).astype(np.float32)
GUESSER = (TARGET + np.random.default_rng(2).normal(0, 1.0, TARGET.shape)).astype(np.float32)
"""logits of the next token by the last one: a model and a worse one"""


def softmax(row: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    mass = np.exp(row.astype(np.float64) / temperature)
    return mass / mass.sum()


class Fixed(random.Random):
    """A generator whose numbers are given."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def speculate(seed: int, count: int, options: dict[str, Any], drawn: bool = True, lengths: int = 2) -> list[int]:
    """`count` tokens after token 0, guessed by `GUESSER` and checked against `TARGET`."""
    state = Sampling.of(Request(text="x", seed=seed, **options), [0], 0)
    text = [0]

    def take(token: int, row: np.ndarray) -> bool:
        text.append(token)
        state.took(token)
        return len(text) <= count

    while len(text) <= count:
        fork, draft, last = state.fork("draft"), Draft(), text[-1]
        for _ in range(lengths):
            if drawn:
                draft.drawn_from.append(probabilities(GUESSER[last], fork))
                last = int(np.searchsorted(draft.drawn_from[-1].cumsum(), fork.generator.random()))
            else:
                last = int(GUESSER[last].argmax())
            draft.ids.append(last)
            fork.took(last)
        accept(TARGET[[text[-1], *draft.ids]], draft, state, take)
    return text[1 : count + 1]


def plain(seed: int, count: int, options: dict[str, Any]) -> list[int]:
    state = Sampling.of(Request(text="x", seed=seed, **options), [0], 0)
    text = [0]
    for _ in range(count):
        text.append(choose(TARGET[text[-1]], state))
        state.took(text[-1])
    return text[1:]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_checked_guess_has_the_models_distribution_exactly(temperature: float) -> None:
    """Σ_guess q(guess) · P(token | guess), the inner one integrated over a grid of the two uniform numbers."""
    state = Sampling.of(Request(text="x", temperature=temperature), [], 0)
    p, q = softmax(TARGET[0], temperature), softmax(GUESSER[0], temperature)
    grid = (np.arange(60) + 0.5) / 60
    found = np.zeros(VOCABULARY)
    for guess, first, second in itertools.product(range(VOCABULARY), grid, grid):
        state.generator = Fixed(first, second)
        found[check(TARGET[0], guess, q, state)] += q[guess] / len(grid) ** 2
    assert found.sum() == pytest.approx(1)
    assert np.abs(found - p).max() < 1.5 / len(grid)
    assert np.abs(q - p).max() > 0.1, "the guesser should be wrong"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8, "presence_penalty": 1.0}])
def test_texts_of_guesses_have_the_distribution_of_plain_ones(options: dict[str, Any]) -> None:
    """Chi-square of all texts of three tokens against the product of the conditional probabilities."""
    draws = 5000
    expected = {}
    for text in itertools.product(range(VOCABULARY), repeat=3):
        state, last, likelihood = Sampling.of(Request(text="x", **options), [0], 0), 0, 1.0
        for token in text:
            likelihood *= probabilities(TARGET[last], state)[token]
            state.took(token)
            last = token
        expected[text] = likelihood * draws
    assert sum(expected.values()) == pytest.approx(draws)
    seen = dict.fromkeys(expected, 0)
    for seed in range(draws):
        seen[tuple(speculate(seed, 3, options))] += 1
    assert all(expected[text] for text, times in seen.items() if times), "a text that cannot be was written"
    common = [text for text, times in expected.items() if times >= 5]
    rare = draws - sum(seen[text] for text in common), draws - sum(expected[text] for text in common)
    cells = [(seen[text], expected[text]) for text in common] + ([rare] if rare[1] > 1 else [])
    chi2 = sum((observed - wanted) ** 2 / wanted for observed, wanted in cells)
    freedom = len(cells) - 1
    assert freedom > 5 and chi2 < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {}, {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 1}]
)
def test_guesses_without_probabilities_change_no_token(options: dict[str, Any]) -> None:
    for seed, lengths in itertools.product(range(40), (1, 2, 5)):
        assert speculate(seed, 12, options, drawn=False, lengths=lengths) == plain(seed, 12, options)


def test_greedy_guesses_of_a_draft_change_no_token() -> None:
    assert speculate(0, 20, {"temperature": 0}) == plain(0, 20, {"temperature": 0})


def test_the_same_seed_gives_the_same_answer() -> None:
    assert speculate(3, 30, {}) == speculate(3, 30, {})
    assert speculate(3, 30, {}) != speculate(4, 30, {})


def test_a_perfect_guesser_is_always_believed() -> None:
    state = Sampling.of(Request(text="x", seed=5), [], 0)
    p = probabilities(TARGET[2], state)
    assert all(check(TARGET[2], guess, p, state) == guess for guess in range(VOCABULARY) for _ in range(50))


def test_an_answer_that_ends_takes_no_more() -> None:
    state = Sampling.of(Request(text="x", temperature=0), [], 0)
    path = [0]
    for _ in range(4):
        path.append(int(TARGET[path[-1]].argmax()))
    taken: list[int] = []

    def take(token: int, row: np.ndarray) -> bool:
        taken.append(token)
        return len(taken) < 2

    assert accept(TARGET[path], Draft(path[1:]), state, take) == 2 and taken == path[1:3]


def naive(text: Sequence[int], count: int, least: int) -> list[int]:
    """The longest end of the text that stands earlier too, of several the last; then what follows, going round."""
    for size in range(min(len(text) - 1, 32), least - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if list(text[start : start + size]) == list(text[-size:]):
                go = start + size
                return [text[go + n % (len(text) - go)] for n in range(count)]
    return []


def test_prompt_lookup_is_the_longest_suffix_match() -> None:
    found = 0
    for seed in range(60):
        rng = random.Random(seed)
        text, lookup = [rng.randrange(4) for _ in range(rng.randint(1, 30))], PromptLookup(rng.choice([1, 2, 3]))
        for _ in range(40):
            text.append(rng.randrange(4) if rng.random() < 0.5 else text[-rng.randint(1, len(text))])
            guess = lookup.propose(text, 5)
            assert guess == naive(text, 5, lookup.least), text
            found += bool(guess)
    assert found > 1000


def test_a_text_that_repeats_is_guessed_in_english_and_in_chinese(tokenizer: Any) -> None:
    encode: Callable[[str], Any] = tokenizer.backend_tokenizer.encode
    for text, rest in (
        ("The registry opens at nine in the morning. Once more: the registry opens at n", "ine in the morning"),
        ("合同自双方签字之日起生效。再说一遍：合同自双方签字", "之日起生效。"),
    ):
        ids, whole = encode(text).ids, encode(text + rest).ids
        wanted = whole[len(ids) :]
        assert PromptLookup().propose(ids, len(wanted)) == wanted


def test_nothing_is_guessed_where_nothing_repeats() -> None:
    assert PromptLookup().propose(list(range(50)), 4) == []
    assert PromptLookup().propose([7], 4) == []


def test_the_pace_follows_what_was_kept() -> None:
    pace = Pace()
    for _ in range(4):
        pace.saw(pace.wanted(), pace.length)
    assert pace.wanted() == 10
    pace.saw(10, 2)
    assert pace.wanted() == 3
    for _ in range(8):  # nothing is ever kept: guesses become short and rare
        while not (wanted := pace.wanted()):
            pass
        pace.saw(wanted, 0)
    steps = [pace.wanted() for _ in range(100)]
    assert max(steps) == 1 and steps.index(1) == 32


def test_a_fork_does_not_move_the_answer() -> None:
    state, twin = (Sampling.of(Request(text="x", seed=9), [], 0) for _ in range(2))
    fork = state.fork("draft")
    fork.took(3)
    assert fork.generator.random() == twin.fork("draft").generator.random()
    assert state.counts == {} and sample(TARGET[:1], [state]) == sample(TARGET[:1], [twin])
