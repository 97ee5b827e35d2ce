"""The chunked output layer against plain cross-entropy in float64, and packed rows against documents alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from fledge.core.errors import FledgeError
from fledge.training import likelihood
from fledge.training.likelihood import Head, head_of, hidden_states, shifted, token_logprobs, weighted_nll
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
    found, _ = weighted_nll(h2, Head(w2), labels, weights.to(dtype))
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
    found = token_logprobs(h2, Head(w2), labels)
    (found.sum(dim=-1).sin() * weights[:, 0]).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found[labels == -100] == 0).all()
    torch.testing.assert_close(h2.grad, h.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(w2.grad, w.grad, rtol=1e-10, atol=1e-10)


def test_bf16_arithmetic_stays_near(problem: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, labels, _ = problem
    expected = _reference(hidden, weight, labels).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = weighted_nll(hidden.float(), Head(weight.float()), labels)
    assert found.dtype == torch.float32
    assert abs(float(found - expected)) < 0.01 * float(expected)


def test_no_labels_at_all_is_zero_and_not_an_error() -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss, _ = weighted_nll(hidden, Head(weight), torch.full((2, 3), -100))
    loss.backward()
    assert float(loss.detach()) == 0 and not hidden.grad.any() and not weight.grad.any()
    assert not token_logprobs(hidden, Head(weight), torch.full((2, 3), -100)).any()


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
    packed = before[:1, start:] @ head_of(model).weight.T
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


def test_a_head_that_is_not_linear_is_refused() -> None:
    model = tiny()
    model.set_output_embeddings(torch.nn.Bilinear(4, 4, 8))
    with pytest.raises(FledgeError, match="not linear"):
        head_of(model)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("biased", [False, True])
def test_bias_scale_cap_and_z_loss_against_autograd_in_float64(
    problem: tuple[torch.Tensor, ...], biased: bool, scale: float, softcap: float, z_loss: float
) -> None:
    hidden, weight, labels, weights = problem
    bias = torch.linspace(-1, 1, 50, dtype=torch.float64)

    def leaves() -> list[torch.Tensor]:
        return [value.clone().requires_grad_() for value in (hidden, weight, bias)]

    h, w, b = leaves()
    logits = scale * (h @ w.T + (b if biased else 0))
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(5, 31)
    log_z = logits.logsumexp(-1) * (labels != -100)
    expected = (weights * (nll + z_loss * log_z**2)).sum()
    (1.5 * expected).backward()

    h2, w2, b2 = leaves()
    head = Head(w2, b2 if biased else None, scale, softcap)
    found, bare = weighted_nll(h2, head, labels, weights, z_loss)
    (1.5 * found).backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(bare, (weights * nll).sum(), rtol=1e-12, atol=0)
    assert not bare.requires_grad
    for ours, theirs in ((h2, h), (w2, w), *([(b2, b)] if biased else [])):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)

    h3, w3, b3 = leaves()
    logprobs = token_logprobs(h3, Head(w3, b3 if biased else None, scale, softcap), labels)
    torch.testing.assert_close(logprobs, -nll, rtol=1e-12, atol=1e-12)
    if not z_loss:
        (-1.5 * (weights * logprobs).sum()).backward()
        torch.testing.assert_close(h3.grad, h.grad, rtol=1e-10, atol=1e-10)


FAMILIES = {
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "phi": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_each_kind_of_head_is_that_of_transformers(family: str) -> None:
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family, **{"vocab_size": 64, "num_key_value_heads": 4, "pad_token_id": 0, **shape, **FAMILIES[family]}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if family == "phi":
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    ids = torch.randint(1, 64, (2, 9))
    theirs = model(input_ids=ids, labels=ids, use_cache=False).loss
    theirs.backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    nll, _ = weighted_nll(hidden_states(model, {"input_ids": ids}), head_of(model), shifted(ids))
    (nll / 16).backward()
    torch.testing.assert_close(nll / 16, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, gradient, rtol=1e-4, atol=1e-6)
