"""Beam search against `transformers.generate`, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fledge.inference.beam import BeamSearch
from fledge.inference.engine import Request
from fledge.inference.sampling import Sampling

STOPS = tuple(range(20, 50))
"""so many that random weights end texts early, late and never"""


def searched(model: Any, prompt: list[int], limit: int, stops: tuple[int, ...], **options: Any) -> BeamSearch:
    """The search over full forward passes."""
    request = Request(prompt_ids=tuple(prompt), **options)
    search = BeamSearch(
        Sampling.of(request, prompt, 0), lambda tokens: tokens[-1] in stops, stops=len(stops), limit=limit
    )
    while not search.done:
        with torch.inference_mode():
            ids = torch.tensor([prompt + beam.tokens for beam in search.beams])
            logits = model(ids, use_cache=False).logits[:, -1].float()
        search.step(list(logits.numpy()))
    return search


def reference(model: Any, prompt: list[int], limit: int, stops: tuple[int, ...], **options: Any) -> list[list[int]]:
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, early_stopping=False, max_new_tokens=limit,
        eos_token_id=list(stops) or None, pad_token_id=3, **options,
    )  # fmt: skip
    rows = [row[len(prompt) :] for row in found.tolist()]
    return [row[: next((n + 1 for n, token in enumerate(row) if token in stops), len(row))] for row in rows]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_equal_transformers(model: Any, beams: int, length_penalty: float) -> None:
    early = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        prompt = rng.integers(50, 330, rng.integers(1, 12)).tolist()
        for stops in ((), STOPS):
            shared = dict(length_penalty=length_penalty)
            search = searched(model, prompt, 12, stops, beams=beams, n=beams, **shared)
            expected = reference(model, prompt, 12, stops, num_beams=beams, num_return_sequences=beams, **shared)
            assert [text.tokens for text in search.results()] == expected
            assert all((text.reason == "stop") == (text.tokens[-1] in stops) for text in search.results())
            early += any(len(text.tokens) < 12 for text in search.results())
    assert early or length_penalty > 1, "some text should have ended early"


def test_penalties_work_on_log_probabilities_as_in_transformers(model: Any) -> None:
    prompt = [60, 61, 62, 60]
    search = searched(model, prompt, 10, STOPS, beams=4, n=2, repetition_penalty=1.7)
    expected = reference(model, prompt, 10, STOPS, num_beams=4, num_return_sequences=2, repetition_penalty=1.7)
    assert [text.tokens for text in search.results()] == expected


def test_the_scores_are_sums_over_length(model: Any) -> None:
    prompt = [70, 71]
    search = searched(model, prompt, 6, (), beams=3, n=3, length_penalty=0.5)
    for text in search.results():
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text.tokens]), use_cache=False).logits[0].double()
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        total = rows[torch.arange(6), torch.tensor(text.tokens)].sum().item()
        assert text.score == pytest.approx(total / 6**0.5, rel=1e-5)


def test_more_beams_than_a_vocabulary_offers() -> None:
    request = Request(text="x", beams=8, n=8)
    search = BeamSearch(Sampling.of(request, [], 0), lambda tokens: False, stops=0, limit=2)
    while not search.done:
        search.step([np.array([0.0, 1.0], np.float32)] * len(search.beams))
    found = [text.tokens for text in search.results()]
    assert found[:4] == [[1, 1], [0, 1], [1, 0], [0, 0]] or found[:4] == [[1, 1], [1, 0], [0, 1], [0, 0]]
    assert len(found) == 8 and found[4:] == [[0, 0]] * 4
