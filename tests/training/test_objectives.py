"""Every objective against its paper's formula in float64, computed another way."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForSequenceClassification

from fledge.core.events import Emitter, Event
from fledge.training.kernels import fast_kernels
from fledge.training.objective import as_batch, side
from fledge.training.objectives.chat import Chat
from fledge.training.objectives.dpo import DPO, pair_logprobs
from fledge.training.objectives.reward import Reward, scores
from fledge.training.reference import WithReference, keys, reference_logprobs
from fledge.training.trainer import Trainer
from tests.training.toys import Pairs, settings, tiny


def summed_logprobs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ log p of the labelled tokens in float64, from whole logits, with an attention mask."""
    exact = tiny().double()
    exact.load_state_dict(model.state_dict())
    logits = exact(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logprobs = torch.log_softmax(logits[:, :-1], dim=-1)
    targets = batch["labels"][:, 1:]
    found = logprobs.gather(2, targets.clamp_min(0)[..., None]).squeeze(-1)
    return (found * (targets >= 0)).sum(dim=-1)


def changed(model: Any, by: float, seed: int = 5) -> Any:
    """The model with noise on its weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return model


def test_dpo_is_equation_7() -> None:
    beta, batch = 0.3, as_batch(Pairs().batch(0))
    reference, policy = tiny(), changed(tiny(), 0.02)
    before = torch.stack([summed_logprobs(reference, side(batch, s)) for s in ("chosen", "rejected")], -1).detach()
    now = torch.stack([summed_logprobs(policy, side(batch, s)) for s in ("chosen", "rejected")], -1).detach()
    ratio = (now - before).numpy()
    expected = [math.log1p(math.exp(-beta * (chosen - rejected))) for chosen, rejected in ratio]
    assert max(expected) - min(expected) > 0.01, "the pairs differ"

    batch["reference"] = before
    batch["weights"] = torch.tensor([1.0, 0.5, 0.25, 1.0])
    objective = DPO(beta)
    terms = objective.loss(objective.forward({"model": policy}, batch), batch)
    assert float(terms["dpo"].sum.detach()) == pytest.approx(
        float(np.dot(expected, batch["weights"].numpy())), rel=1e-5
    )
    assert terms["dpo"].weight == 2.75 == objective.weights(batch)["dpo"]
    right = float(((ratio[:, 0] > ratio[:, 1]) * batch["weights"].numpy()).sum())
    assert float(terms["accuracy"].sum.detach()) == pytest.approx(right) and terms["accuracy"].coefficient == 0
    assert float(terms["chosen_reward"].sum.detach()) == pytest.approx(
        float(beta * (ratio[:, 0] * batch["weights"].numpy()).sum()), rel=1e-3, abs=1e-4
    )


def test_the_first_dpo_loss_is_ln_2_whatever_dropout_is_configured(
    tmp_path: Path, events: Emitter, heard: list[Event]
) -> None:
    for dtype, micro_batch in (("float32", 0), ("bfloat16", 0), ("bfloat16", 3)):
        heard.clear()
        model = tiny()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        model.eval()
        source, chosen = Pairs(), settings(dtype=dtype, lr=1e-3)

        def ask(batch: Any, model: Any = model, dtype: str = dtype, size: int = micro_batch or 4) -> torch.Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                rows = [slice(i, i + size) for i in range(0, 4, size)]
                return torch.cat([pair_logprobs(model, {k: v[r] for k, v in batch.items()}) for r in rows])

        with fast_kernels([model], "cpu", dtype):  # those of the steps
            known = reference_logprobs(source, len(source), ask, tmp_path / f"{dtype}{micro_batch}.safetensors")
        run = Trainer(
            DPO(0.1), {"model": model}, WithReference(source, known), chosen, 30, 0, events, micro_batch=micro_batch
        )
        run.fit()
        losses = [e.value for e in heard if e.name == "dpo"]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-7), "the policy is the reference"
        assert losses[-1] < 0.5
        assert [e.value for e in heard if e.name == "accuracy"][-1] == 1.0


def test_reference_is_computed_once_and_kept(tmp_path: Path) -> None:
    source, asked = Pairs(), []

    def ask(batch: Any) -> torch.Tensor:
        asked.append(len(batch["weights"]))
        return torch.arange(8.0).view(4, 2) + 10 * len(asked)

    file = tmp_path / "work/reference.safetensors"
    first = reference_logprobs(source, 4, ask, file)
    assert asked == [4, 4, 4, 4] and len(first) == 16
    again = reference_logprobs(source, 4, ask, file)
    assert asked == [4, 4, 4, 4], "read back, not asked again: by then the policy has changed"
    batch = WithReference(source, again).batch(6)
    assert batch["reference"].tolist() == (torch.arange(8.0).view(4, 2) + 30).tolist(), "step 6 is step 2 again"


def test_a_pairs_key_ignores_padding_and_nothing_else() -> None:
    batch = as_batch(Pairs().batch(0))
    wider = {
        name: F.pad(value, (0, 3), value=-100 if name.endswith("labels") else 0) if value.ndim == 2 else value
        for name, value in batch.items()
    }
    assert keys(wider) == keys(batch)
    assert len(set(keys(batch))) == 4
    batch["rejected.input_ids"][2, 3] += 1
    assert [a == b for a, b in zip(keys(batch), keys(wider), strict=True)] == [True, True, False, True]


def classifier(seed: int = 1) -> Any:
    """A tiny reward model."""
    config = tiny(seed).config
    config.num_labels, config.pad_token_id = 1, 1
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


def test_scores_stand_at_the_last_attended_token() -> None:
    model, batch = classifier().eval(), side(as_batch(Pairs().batch(0)), "chosen")
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(scores(model, batch), expected, rtol=1e-5, atol=1e-6)
    spoiled = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, torch.tensor(9))}
    torch.testing.assert_close(scores(model, spoiled), expected, rtol=1e-5, atol=1e-6)


def test_k_ranked_answers_count_as_the_mean_over_their_pairs() -> None:
    """Ouyang et al. (2022), eq. 1: −1 / C(K, 2) Σ log σ(r_better − r_worse), then the mean over prompts."""
    ranked = {"first": [2.0, 0.5, -1.0, 0.3], "second": [0.1, 0.7]}
    expected, left, right, weights = [], [], [], []
    for rewards in ranked.values():
        pairs = list(combinations(rewards, 2))
        expected.append(sum(math.log1p(math.exp(-(a - b))) for a, b in pairs) / len(pairs))
        left += [a for a, _ in pairs]
        right += [b for _, b in pairs]
        weights += [1 / len(pairs)] * len(pairs)
    batch = {"weights": torch.tensor(weights, dtype=torch.float64)}
    terms = Reward().loss(torch.tensor([left, right], dtype=torch.float64), batch)
    found = float(terms["ranking"].sum) / float(terms["ranking"].weight)
    assert found == pytest.approx(sum(expected) / 2, rel=1e-12)
    assert Reward().weights(batch)["ranking"] == pytest.approx(2.0)
    better = sum(w for a, b, w in zip(left, right, weights, strict=True) if a > b) / 2
    assert float(terms["accuracy"].sum) / float(terms["accuracy"].weight) == pytest.approx(better)


def test_a_reward_model_learns_its_pairs(events: Emitter, heard: list[Event]) -> None:
    run = Trainer(Reward(), {"model": classifier()}, Pairs(), settings(lr=1e-2), 40, 0, events)
    run.fit()
    curve = [e.value for e in heard if e.name == "ranking"]
    assert curve[0] == pytest.approx(math.log(2), abs=0.2) and curve[-1] < 0.1
    assert [e.value for e in heard if e.name == "accuracy"][-1] == 1.0


def test_chat_loss_is_the_mean_over_the_labelled_tokens() -> None:
    model, batch = tiny(), side(as_batch(Pairs().batch(1)), "chosen")
    objective = Chat()
    term = objective.loss(objective.forward({"model": model}, batch), batch)["nll"]
    count = int((batch["labels"][:, 1:] >= 0).sum())
    assert term.weight == objective.weights(batch)["nll"] == count > 10
    assert float(term.sum.detach()) == pytest.approx(-float(summed_logprobs(model, batch).sum().detach()), rel=1e-5)
