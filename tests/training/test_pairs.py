"""Pairs out of preferences, accuracy with its interval, and the baselines that take no training."""

from __future__ import annotations

import pytest
import torch

from fledge.data.tokens.batches import Pair
from fledge.records.chat import ChatRenderer, Rendered
from fledge.records.kinds import Answer, Message, Preference
from fledge.training.objective import Batch
from fledge.training.pairs import Contest, accuracy, ask, baselines, contests, wilson
from tests.training.toys import tokenizer


def preference(*answers: tuple[str, int], prompt: str = "hello", language: str = "en") -> Preference:
    return Preference((Message("user", prompt),), tuple(Answer(*a) for a in answers), language=language)


def test_k_answers_make_all_their_pairs_with_equal_shares() -> None:
    names = tokenizer()
    renderer = ChatRenderer(names)
    found = list(
        contests(renderer, [preference(("good", 1), ("fair", 2), ("bad", 3)), preference(("a", 1), ("b", 1))], 64)
    )
    assert [c.characters for c in found] == [(4, 4), (4, 3), (4, 3)] and {c.pair.weight for c in found} == {1 / 3}
    for contest in found:
        for row in (contest.pair.chosen, contest.pair.rejected):
            start = row.weights.index(1.0)
            assert row.weights == [0.0] * start + [1.0] * (len(row.ids) - start)
            assert row.ids[-1] in renderer.stop_ids, "the end of the turn is part of the answer"
    texts = [names.decode(c.pair.chosen.ids[c.pair.chosen.weights.index(1.0) : -1]) for c in found]
    assert texts == ["good", "good", "fair"]


def test_a_long_prompt_loses_its_beginning_and_never_the_answer() -> None:
    renderer = ChatRenderer(tokenizer())
    (contest,) = contests(renderer, [preference(("there you are", 1), ("no", 2), prompt="hello " * 50)], 24)
    (whole,) = contests(renderer, [preference(("there you are", 1), ("no", 2), prompt="hello " * 50)], 4096)
    assert len(contest.pair.chosen.ids) == 24
    assert contest.pair.chosen.ids == whole.pair.chosen.ids[-24:]
    assert contest.tokens == whole.tokens
    kept = len(contest.pair.chosen.ids) - int(contest.tokens[0])
    assert contest.pair.rejected.ids[:kept] == contest.pair.chosen.ids[:kept], "one prompt for both"


def made(
    characters: tuple[int, int], language: str = "en", tokens: tuple[int, int] = (2, 2), first: int = 5
) -> Contest:
    rows = [Rendered([first, *range(10, 10 + n)], [0.0] + [1.0] * n) for n in tokens]
    return Contest(Pair(*rows), language, characters)


def test_asking_in_batches_keeps_the_order() -> None:
    all_of_them = [made((1, 1), tokens=(i % 7 + 1, i % 3 + 1), first=i) for i in range(40)]

    def scores(batch: Batch) -> torch.Tensor:
        return batch["input_ids"][:, 0] * 100 + batch["attention_mask"].sum(dim=-1)

    found = ask(all_of_them, 0, scores)
    assert found.tolist() == [[i * 100 + i % 7 + 2, i * 100 + i % 3 + 2] for i in range(40)]


def test_accuracy_counts_a_tie_as_half_and_tells_languages_apart() -> None:
    some = [made((1, 1), "en"), made((1, 1), "en"), made((1, 1), "zh"), made((1, 1), "zh")]
    found = accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0]), some)
    assert (found["accuracy"], found["accuracy_en"], found["accuracy_zh"]) == (0.625, 0.5, 0.75)
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson(2.5, 4)


def test_wilson_by_the_book() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_baselines_take_length_and_likelihood() -> None:
    some = [made((9, 3), tokens=(4, 1)), made((2, 3), tokens=(2, 2)), made((4, 4), tokens=(1, 2))]
    found = baselines(torch.tensor([[-8.0, -3.0], [-2.0, -5.0], [-4.0, -4.0]]), some)
    assert found["longer"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["likelier"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert found["likelier_mean"] == pytest.approx((1 + 1 + 0) / 3), "-2 > -3, -1 > -2.5, -4 < -2"
