"""Sampling against a plain numpy computation of the distribution that it should follow."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from fledge.core.errors import FledgeError
from fledge.inference.engine import Request
from fledge.inference.sampling import (
    Sampling,
    candidates,
    likeliest,
    logprobs_of,
    penalise,
    pick,
    probabilities,
    sample,
)

LOGITS = np.random.default_rng(0).normal(0, 2, 50).astype(np.float32)


def expected(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The distribution after temperature → top-k → top-p of the rest → min-p, written the slow way."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        order = order[:top_k]
    mass, kept = 0.0, []
    total = sum(p[i] for i in order)
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    q = np.zeros_like(p)
    q[kept] = p[kept]
    return q / q.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_the_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    state = Sampling.of(Request(text="x", seed=1, **options), [], 0)
    draws = 8000
    counts = Counter(sample(np.tile(LOGITS, (draws, 1)), [state] * draws))
    q = expected(**options)
    seen = np.array([counts[i] for i in range(len(q))]) / draws
    assert set(np.flatnonzero(seen)) <= set(np.flatnonzero(q)), "a token that should have been cut was drawn"
    assert np.abs(seen - q).max() < 4 * np.sqrt(0.25 / draws)
    chi2 = (draws * (seen - q)[q > 1e-3] ** 2 / q[q > 1e-3]).sum()
    assert chi2 < 3 * max(8, (q > 1e-3).sum())


def test_each_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    import random

    options = {"temperature": 0.8, "top_k": 12, "top_p": 0.9}
    state, twin = (Sampling.of(Request(text="x", seed=7, **options), [], 0) for _ in range(2))
    assert isinstance(twin.generator, random.Random)
    cumulative = expected(**options).cumsum()
    for _ in range(200):
        assert sample(LOGITS[None], [state]) == [int(np.searchsorted(cumulative, twin.generator.random(), "right"))]


def test_temperature_zero_takes_the_first_maximum() -> None:
    row = np.zeros((1, 9), np.float32)
    row[0, [3, 6]] = 1
    assert sample(row, [Sampling.of(Request(text="x", temperature=0), [], 0)]) == [3]


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    states = [Sampling.of(Request(text="x", temperature=1e-30, top_p=0.5, seed=seed), [], 0) for seed in range(20)]
    assert sample(np.tile(LOGITS * 1e4, (20, 1)), states) == [int(LOGITS.argmax())] * 20


def test_the_rest_of_the_batch_does_not_change_a_draw() -> None:
    options = [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"presence_penalty": 1.5}, {"min_p": 0.1}]
    requests = [Request(text="x", seed=5, **option) for option in options]
    together = [Sampling.of(request, [], 0) for request in requests]
    alone = [Sampling.of(request, [], 0) for request in requests]
    for _ in range(30):
        batch = sample(np.tile(LOGITS, (len(options), 1)), together)
        single = [sample(LOGITS[None], [state])[0] for state in alone]
        assert batch == single
        for state, other, token in zip(together, alone, batch, strict=True):
            state.took(token)
            other.took(token)


def test_seeds_and_answers_have_streams_of_their_own() -> None:
    def draws(seed: int, index: int) -> list[float]:
        generator = Sampling.of(Request(text="x", seed=seed, n=9), [], index).generator
        return [generator.random() for _ in range(3)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, index)) for seed in (1, 2, 3) for index in (0, 1, 2)}) == 9


def test_penalties_and_bias() -> None:
    request = Request(
        text="x", repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: -100.0, 8: 3.0}
    )
    state = Sampling.of(request, [1, 2], 0)
    for token in (2, 3, 3):
        state.took(token)
    row = np.array([1, 2, -2, 4, 5, 6, 7, 8, 9], np.float32)
    penalise(row, state)
    # repetition over prompt and answer: 1, 2, 3; presence and frequency over the answer alone: 2 once, 3 twice
    assert row.tolist() == [1, 1, -4 - 0.75, 2 - 1.0, 5, 6, 7, -92, 12]


def test_sampling_leaves_the_logits_alone() -> None:
    logits = LOGITS[None].copy()
    sample(logits, [Sampling.of(Request(text="x", presence_penalty=1, logit_bias={0: 5.0}, top_p=0.5), [], 0)])
    assert (logits[0] == LOGITS).all()


def test_logprobs_are_the_models_own() -> None:
    states = [Sampling.of(Request(text="x", temperature=9.0, logprobs=n), [], 0) for n in (0, 3)]
    states.append(Sampling.of(Request(text="x"), [], 0))
    first, second, third = logprobs_of(np.tile(LOGITS, (3, 1)), [4, 4, 4], states)
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert first is not None and first.logprob == pytest.approx(exact[4], abs=1e-5) and first.top == ()
    assert second is not None and [id for id, _ in second.top] == np.argsort(-LOGITS)[:3].tolist()
    assert [p for _, p in second.top] == pytest.approx(np.sort(exact)[::-1][:3].tolist(), abs=1e-5)
    assert third is None


def wide(seed: int, spread: float = 2.0) -> np.ndarray:
    """A row as long as a real vocabulary's, where whole rows are no longer sorted."""
    return np.random.default_rng(seed).normal(0, spread, 49_152).astype(np.float32)


@pytest.mark.parametrize(
    "options", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 7, "top_p": 0.5, "min_p": 0.3}, {"min_p": 0.1}]
)
@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
def test_long_rows_are_cut_like_short_ones(options: dict[str, Any], spread: float) -> None:
    row = wide(3, spread)
    p = np.exp(row.astype(np.float64))
    order = np.argsort(-p)[: options.get("top_k") or len(p)]
    reached = p[order].cumsum()
    order = order[: 1 + int(np.searchsorted(reached, options.get("top_p", 1.0) * reached[-1]))]
    order = order[p[order] >= options.get("min_p", 0.0) * p[order[0]]]
    q = probabilities(row, Sampling.of(Request(text="x", **options), [], 0))
    assert abs(len(set(order) ^ set(np.flatnonzero(q)))) <= 1, "rounding may move the border by one token"
    assert q[order] == pytest.approx(p[order] / p[order].sum(), rel=1e-3, abs=1e-7)


def test_equal_logits_are_kept_together() -> None:
    row = np.repeat(np.array([3, 2, 1], np.float32), 5)
    for options in ({"top_k": 6}, {"top_p": 0.7}):
        kept = np.flatnonzero(probabilities(row, Sampling.of(Request(text="x", **options), [], 0)))
        assert kept.tolist() == list(range(10))
    assert len(np.flatnonzero(probabilities(row, Sampling.of(Request(text="x", top_p=1e-9), [], 0)))) == 5
    assert likeliest(np.zeros(60_000, np.float32), 3).tolist() == list(range(60_000))


def test_the_likeliest_of_a_long_row() -> None:
    for seed, count in ((1, 1), (2, 50), (3, 700), (4, 20_000)):
        row = wide(seed)
        row[seed * 100 : seed * 100 + 30] = 9.0
        expected = np.flatnonzero(row >= np.sort(row)[-count])
        assert likeliest(row, count).tolist() == expected.tolist()


def test_draws_of_a_long_row_are_the_inverse_of_the_cumulative_distribution() -> None:
    row = wide(5)
    row[:3000] = row[-500:] = -np.inf  # as a constraint leaves it
    exact = np.exp(row.astype(np.float64)).cumsum()
    ids, mass = candidates(row, Request(text="x"))
    for uniform in np.linspace(0, 1, 400, endpoint=False):
        token = pick(ids, mass, float(uniform))
        assert abs(token - int(np.searchsorted(exact, uniform * exact[-1], "right"))) <= 1 and np.isfinite(row[token])
    assert np.isfinite(row[pick(ids, mass, 0.0)]) and np.isfinite(row[pick(ids, mass, 1 - 2**-53)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("n", 0),
        ("max_new_tokens", 0),
        ("logprobs", 21),
        ("stop", ("",)),
        ("beams", 33),
        ("length_penalty", 11),
        ("best_of", 0),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(FledgeError, match=name):
        Request(text="x", **{name: value})


def test_beams_and_numbers_of_answers_go_together() -> None:
    assert Request(text="x", beams=4, n=4).n == 4
    for options in ({"n": 5}, {"best_of": 3}):
        with pytest.raises(FledgeError, match="beams"):
            Request(text="x", beams=4, **options)


def test_a_request_has_one_prompt() -> None:
    with pytest.raises(FledgeError, match="exactly one"):
        Request()
    with pytest.raises(FledgeError, match="exactly one"):
        Request(text="x", prompt_ids=(1,))
