"""The chunked output layer against plain cross-entropy in float64, and packed rows against documents alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fledge.core.errors import FledgeError
from fledge.training import likelihood
from fledge.training.likelihood import hidden_states, output_weight, shifted, token_logprobs, weighted_nll
from fledge.training.objective import as_batch
from tests.training.toys import Packed, tiny


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, labels with ignored ones, weights; in float64, and in chunks of 32 rows."""
    monkeypatch.setattr(likelihood, "CHUNK", 1)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 31, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(50, (5, 31), generator=generator)
    labels[torch.rand(5, 31, generator=generator) < 0.3] = -100
    return hidden, weight, labels, torch.rand(5, 31, generator=generator, dtype=torch.float64)


def _reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.T).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none").view(labels.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weighted_nll_equals_cross_entropy_and_its_gradients(
    problem: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> None:
    hidden, weight, labels, weights = problem
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = (weights * _reference(h, w, labels)).sum()
    (2.5 * expected).backward()
    h2, w2 = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    found = weighted_nll(h2, w2, labels, weights.to(dtype))
    (2.5 * found).backward()
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(h2.grad.double(), h.grad, rtol=tolerance * 30, atol=tolerance * 30)
    torch.testing.assert_close(w2.grad.double(), w.grad, rtol=tolerance * 30, atol=tolerance * 30)


def test_token_logprobs_equal_log_softmax_and_its_gradients(problem: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, labels, weights = problem
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = -_reference(h, w, labels)
    (expected.sum(dim=-1).sin() * weights[:, 0]).sum().backward()
    h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = token_logprobs(h2, w2, labels)
    (found.sum(dim=-1).sin() * weights[:, 0]).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found[labels == -100] == 0).all()
    torch.testing.assert_close(h2.grad, h.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(w2.grad, w.grad, rtol=1e-10, atol=1e-10)


def test_bf16_arithmetic_stays_near(problem: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, labels, _ = problem
    expected = _reference(hidden, weight, labels).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weighted_nll(hidden.float(), weight.float(), labels)
    assert found.dtype == torch.float32
    assert abs(float(found - expected)) < 0.01 * float(expected)


def test_no_labels_at_all_is_zero_and_not_an_error() -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = weighted_nll(hidden, weight, torch.full((2, 3), -100))
    loss.backward()
    assert float(loss.detach()) == 0 and not hidden.grad.any() and not weight.grad.any()
    assert not token_logprobs(hidden, weight, torch.full((2, 3), -100)).any()


def test_shift_predicts_the_next_token_and_nothing_at_the_end() -> None:
    assert shifted(torch.tensor([[5, 6, -100, 8]])).tolist() == [[6, -100, 8, -100]]


def test_documents_of_a_packed_row_do_not_see_each_other() -> None:
    model = tiny()
    batch = as_batch(Packed(rows=2).batch(0))
    before = hidden_states(model, batch)
    start = int((batch["position_ids"][0, 1:] == 0).nonzero()[0]) + 1
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, :start] = (changed["input_ids"][0, :start] + 7) % 64
    after = hidden_states(model, changed)
    assert torch.equal(before[0, start:], after[0, start:])
    assert not torch.allclose(before[0, :start], after[0, :start], atol=1e-3)
    alone = model(input_ids=batch["input_ids"][:1, start:], use_cache=False).logits
    packed = before[:1, start:] @ output_weight(model).T
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_changes_nothing() -> None:
    model = tiny()
    ids = torch.arange(2, 12)[None]
    plain = hidden_states(model, {"input_ids": ids})
    padded = torch.cat([ids, torch.ones(1, 6, dtype=torch.long)], dim=1)
    mask = (torch.arange(16) < 10).long()[None]
    positions = torch.arange(16)[None]
    found = hidden_states(model, {"input_ids": padded, "attention_mask": mask, "position_ids": positions})
    torch.testing.assert_close(found[:, :10], plain, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_not_a_matrix_is_refused() -> None:
    model = tiny()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(FledgeError, match="more than a matrix"):
        output_weight(model)
