"""A draft model guesses what it would write itself, whatever was kept of its last guesses."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from fledge.inference.drafting import DraftModel, Want
from fledge.inference.engine import Request
from fledge.inference.forward import Forward
from fledge.inference.sampling import Sampling
from tests.inference import tiny


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny.llama(5)


@pytest.fixture(scope="module")
def forward() -> Forward:
    return Forward(tiny.llama(5))


def logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().numpy()


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    text = list(ids)
    for _ in range(count):
        text.append(int(logits(model, text).argmax()))
    return text[len(ids) :]


def want(key: str, ids: list[int], count: int, **options: Any) -> Want:
    return Want(key, ids, count, Sampling.of(Request(text="x", **({"temperature": 0} | options)), ids, 0))


def test_drafts_are_what_the_model_would_write(forward: Forward, reference: Any) -> None:
    drafts, rng = DraftModel(forward, blocks=64, vocabulary=330), random.Random(0)
    texts = {name: [rng.randrange(4, 330) for _ in range(rng.randint(1, 50))] for name in "abc"}
    for _ in range(6):
        counts = {name: rng.randint(0, 5) for name in texts}
        found = drafts.propose([want(name, list(ids), counts[name]) for name, ids in texts.items()])
        for (name, ids), draft in zip(texts.items(), found, strict=True):
            assert draft.ids == greedy(reference, ids, counts[name]) and not draft.drawn_from
            kept = rng.randint(0, len(draft.ids))
            ids += [*draft.ids[:kept], rng.randrange(4, 330)]


def test_draws_come_with_their_distributions(forward: Forward, reference: Any) -> None:
    ids = [7, 8, 9]
    drafts = DraftModel(forward, blocks=8, vocabulary=330)
    asked = want("a", ids, 3, temperature=0.8, top_k=20, seed=1)
    draft, again = drafts.propose([asked])[0], drafts.propose([asked])[0]
    assert draft.ids == again.ids and len(draft.ids) == len(draft.drawn_from) == 3
    text = list(ids)
    for id, drawn_from in zip(draft.ids, draft.drawn_from, strict=True):
        row = logits(reference, text).astype(np.float64) / 0.8
        p = np.where(row >= np.sort(row)[-20], np.exp(row - row.max()), 0)
        assert drawn_from == pytest.approx(p / p.sum(), abs=1e-4) and drawn_from[id] > 0
        text.append(id)


def test_guesses_end_with_a_stop_token(forward: Forward, reference: Any) -> None:
    ids = [7, 8, 9]
    path = greedy(reference, ids, 5)
    asked = want("a", ids, 5)
    asked.stop_ids = frozenset({path[2]})
    assert DraftModel(forward, blocks=8, vocabulary=330).propose([asked])[0].ids == path[: path.index(path[2]) + 1]


def test_without_room_there_is_no_draft(forward: Forward, reference: Any) -> None:
    drafts = DraftModel(forward, blocks=1, vocabulary=330)
    ids, more = list(range(10, 20)), list(range(30, 40))
    assert [len(d.ids) for d in drafts.propose([want("a", ids, 4), want("b", more, 4)])] == [4, 0]
    drafts.release("a")
    drafts.release("unknown")
    assert drafts.propose([want("b", more, 4)])[0].ids == greedy(reference, more, 4)
    assert drafts.propose([want("c", [5] * 255, 4)])[0].ids == [], "beyond the context"


@pytest.mark.parametrize("vocabulary", [300, 350])
def test_padded_embeddings(forward: Forward, vocabulary: int) -> None:
    drafts = DraftModel(forward, blocks=8, vocabulary=vocabulary)
    draft = drafts.propose([want("a", [7, 8], 3, temperature=1.0, seed=1)])[0]
    assert max(draft.ids) < 330 and {len(row) for row in draft.drawn_from} == {vocabulary}
    assert all(row[330:].sum() == 0 and row.sum() == pytest.approx(1) for row in draft.drawn_from)
