"""Classification, tagging, contrastive learning and Reptile against computations made another way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
)

from fledge.core.events import Emitter
from fledge.training.objective import Batch, Objective, Term, as_batch, take
from fledge.training.objectives.contrastive import Contrastive, embed
from fledge.training.objectives.reptile import Inner, Reptile
from fledge.training.objectives.sequence_classification import SequenceClassification
from fledge.training.objectives.token_classification import TokenClassification
from fledge.training.trainer import Trainer
from tests.training.toys import settings

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


def model_of(family: str, auto: Any, **config: Any) -> Any:
    """A tiny BERT or LLaMA with a head, without dropout."""
    torch.manual_seed(3)
    if family == "bert":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return auto.from_config(
            BertConfig(**SIZES, **still, pad_token_id=0, max_position_embeddings=64, **config)
        ).eval()
    return auto.from_config(LlamaConfig(**SIZES, pad_token_id=0, max_position_embeddings=64, **config)).eval()


def rows(count: int = 6, length: int = 11, seed: int = 0, each: int = 0) -> dict[str, Tensor]:
    """Right-padded rows of uneven lengths with a label, or with `each` of five labels on some of the tokens."""
    rng = np.random.default_rng(seed)
    ids, mask = np.zeros((count, length), dtype=np.int64), np.zeros((count, length), dtype=np.int64)
    tags = np.full((count, length), -100, dtype=np.int64)
    for row in range(count):
        size = 3 + row % (length - 2)
        ids[row, :size], mask[row, :size] = rng.integers(1, 64, size), 1
        tags[row, 1 : 2 + row] = rng.integers(0, 5, min(length, 2 + row) - 1)
    labels = tags if each else rng.integers(0, 3, count)
    return as_batch({"input_ids": ids, "attention_mask": mask, "labels": labels})


def gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def whole(objective: Objective, model: Any, batch: Batch, size: int) -> Tensor:
    """The loss as the Trainer makes it, `size` rows at a time."""
    totals = objective.weights(batch)
    count, total = len(next(iter(batch.values()))), torch.zeros(())
    for start in range(0, count, size):
        micro = take(batch, slice(start, start + size))
        for name, term in objective.loss(objective.forward({"model": model}, micro), micro).items():
            if term.coefficient:
                total = total + term.sum / totals[name]
    return total


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sequence_classification_is_the_loss_of_transformers_however_rows_are_split(family: str) -> None:
    model, batch = model_of(family, AutoModelForSequenceClassification, num_labels=3), rows()
    theirs = model(**batch).loss
    expected = gradient(model, theirs)
    for size in (6, 4, 1):
        ours = whole(SequenceClassification(), model, batch, size)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        found = gradient(model, ours)
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_class_weights_and_label_smoothing_are_those_of_torch_on_uneven_parts() -> None:
    model, batch = model_of("llama", AutoModelForSequenceClassification, num_labels=3), rows(7)
    weights = [0.2, 1.0, 3.5]
    objective = SequenceClassification(weights, label_smoothing=0.1)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    log_p = torch.log_softmax(logits, dim=-1)
    w, y = torch.tensor(weights, dtype=torch.float64), batch["labels"]
    # by hand: (1 − ε) · w[y] · −log p[y] + ε / K · Σ w[c] · −log p[c], divided by Σ w[y]
    by_hand = (0.9 * w[y] * -log_p[torch.arange(7), y] + 0.1 / 3 * (w * -log_p).sum(dim=-1)).sum() / w[y].sum()
    torchs = nn.CrossEntropyLoss(w, label_smoothing=0.1)(logits, y)
    assert by_hand.item() == pytest.approx(torchs.item(), rel=1e-12)
    expected = gradient(model, torchs)
    for size in (7, 3, 1):
        ours = whole(objective, model, batch, size)
        assert ours.item() == pytest.approx(by_hand.item(), rel=1e-6)
        found = gradient(model, ours)
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_token_classification_weighs_every_labelled_token_alike(family: str) -> None:
    model, batch = model_of(family, AutoModelForTokenClassification, num_labels=5), rows(each=5)
    theirs = model(**batch).loss
    expected = gradient(model, theirs)
    means = []
    for size in (6, 4, 1):
        ours = whole(TokenClassification(), model, batch, size)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        found = gradient(model, ours)
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    for row in range(6):
        means.append(whole(TokenClassification(), model, take(batch, slice(row, row + 1)), 1).item())
    assert np.mean(means) != pytest.approx(theirs.item(), rel=1e-3), "a mean of means would be another number"


def pairs(count: int = 6, negatives: bool = False, seed: int = 1) -> dict[str, Tensor]:
    sides = {"anchor": rows(count, seed=seed), "positive": rows(count, 14, seed=seed + 1)}
    if negatives:
        sides["negative"] = rows(count, 9, seed=seed + 2)
    for side in sides.values():
        del side["labels"]
    return as_batch(sides)


def infonce(anchors: Any, candidates: Any, temperature: float) -> float:
    """−mean log softmax of the own partner's cosine, in float64 by numpy."""
    a, c = (np.asarray(x.detach(), dtype=np.float64) for x in (anchors, candidates))
    a, c = a / np.linalg.norm(a, axis=1, keepdims=True), c / np.linalg.norm(c, axis=1, keepdims=True)
    scores = a @ c.T / temperature
    scores -= scores.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(a)), np.arange(len(a))]))


def pooled(model: Any, batch: Batch, name: str, pooling: str) -> Tensor:
    """Vectors by a loop over rows without padding."""
    found = []
    for ids, mask in zip(batch[f"{name}.input_ids"], batch[f"{name}.attention_mask"], strict=True):
        hidden = model(input_ids=ids[mask.bool()][None]).last_hidden_state[0]
        found.append({"mean": hidden.mean(dim=0), "last": hidden[-1], "cls": hidden[0]}[pooling])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("family", "pooling", "negatives"), [("bert", "cls", True), ("bert", "mean", False), ("llama", "last", True)]
)
def test_infonce_is_numpys_in_float64(family: str, pooling: Any, negatives: bool) -> None:
    model, batch = model_of(family, AutoModel).double(), pairs(negatives=negatives)
    expected = [pooled(model, batch, name, pooling) for name in ("positive", "negative")[: 1 + negatives]]
    reference = infonce(pooled(model, batch, "anchor", pooling), torch.cat(expected), 0.05)
    objective = Contrastive(0.05, pooling)
    assert whole(objective, model, batch, 6).item() == pytest.approx(reference, rel=1e-10)


def test_reading_a_few_texts_at_a_time_changes_nothing_dropout_included() -> None:
    for share in (0.0, 0.3):
        model, batch = model_of("bert", AutoModel), {k: v for k, v in pairs().items() if "positive" not in k}
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = share
        model.train()
        found = {}
        for size in (0, 4, 1):
            # dropout draws in the order of reading: fixed by the micro-batch, and the same when read again
            torch.manual_seed(7)
            loss = whole(Contrastive(0.1, "mean", size), model, batch, 6)
            found[size] = loss.item(), gradient(model, loss)
        for size in (4, 1):
            if not share:
                assert found[size][0] == pytest.approx(found[0][0], rel=1e-6)
                assert float((found[size][1] - found[0][1]).norm() / found[0][1].norm()) < 1e-5
        if share:  # the gradient is that of the loss that was told: a small step down it lowers it as predicted
            torch.manual_seed(7)
            before, slope = found[4]
            with torch.no_grad():
                step, at = 1e-3 / float(slope.norm()), 0
                for p in (p for p in model.parameters() if p.grad is not None):
                    p -= step * slope[at : at + p.numel()].view_as(p)
                    at += p.numel()
            torch.manual_seed(7)
            after = whole(Contrastive(0.1, "mean", 4), model, batch, 6).item()
            assert before - after == pytest.approx(step * float(slope.norm()) ** 2, rel=0.05)


def test_simcse_without_dropout_finds_itself_and_with_it_learns(events: Emitter) -> None:
    model, batch = model_of("bert", AutoModel), {k: v for k, v in pairs().items() if "positive" not in k}
    vectors = embed(model.eval(), {k.removeprefix("anchor."): v for k, v in batch.items()}, "mean")
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(6))
    plain = whole(Contrastive(0.05, "mean"), model, batch, 6).item()
    assert plain == pytest.approx(infonce(vectors, vectors, 0.05), rel=1e-4)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.1

    class One:
        def batch(self, step: int) -> Any:
            return batch

    Trainer(Contrastive(0.05, "mean"), {"model": model}, One(), settings(lr=1e-3, grad_clip=1.0), 40, 0, events).fit()
    assert whole(Contrastive(0.05, "mean"), model.eval(), batch, 6).item() < 0.5 * plain


class Quadratic(Objective):
    """Half the squared distance of two numbers from the row's, weighed unevenly."""

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"distance": float(len(batch["target"]))}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> Tensor:
        return models["model"].theta - batch["target"]

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Term]:
        scale = torch.tensor([1.0, 3.0], dtype=outputs.dtype)
        return {"distance": Term(0.5 * (scale * outputs**2).sum(), len(outputs))}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0]))


class Targets:
    """Four tasks a step, three inner steps of two rows each."""

    def batch(self, step: int) -> Any:
        return {"target": np.random.default_rng([9, step]).normal(size=(4, 3, 2, 2)).astype("float32")}


def by_hand(theta: Any, steps: int, total: int, optimizer: str) -> Any:
    """Algorithm 2 of the paper in numpy, ε falling linearly from 0.8."""
    for step in range(steps):
        ends = []
        for task in Targets().batch(step)["target"]:
            phi, second = theta.copy(), np.zeros(2)
            for index, targets in enumerate(task):
                g = np.array([1.0, 3.0]) * (phi - targets).mean(axis=0)
                if optimizer == "adam":  # β₁ = 0
                    second = 0.999 * second + 0.001 * g * g
                    g = g / (np.sqrt(second / (1 - 0.999 ** (index + 1))) + 1e-8)
                phi = phi - 0.1 * g
            ends.append(phi)
        epsilon = 0.8 * (1 - (step + 1) / total)
        theta = theta + epsilon * (np.mean(ends, axis=0) - theta)
    return theta


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_reptile_is_algorithm_2_and_resumes_exactly(optimizer: Any, events: Emitter, tmp_path: Path) -> None:
    chosen = settings(lr=0.8, optimizer="sgd", schedule="linear", warmup=0, grad_clip=0, checkpoint_every=2)
    expected = by_hand(np.array([1.0, -2.0]), 6, 6, optimizer)

    def train(model: nn.Module, steps: int, folder: Path, micro_batch: int = 0) -> None:
        objective = Reptile(Inner(Quadratic(), 0.1, optimizer))
        Trainer(objective, {"model": model}, Stop(steps), chosen, 6, 0, events, folder, micro_batch).fit()

    class Stop(Targets):
        def __init__(self, steps: int) -> None:
            self.steps = steps

        def batch(self, step: int) -> Any:
            if step >= self.steps:
                raise KeyboardInterrupt
            return super().batch(step)

    one, split, resumed = Two(), Two(), Two()
    train(one, 6, tmp_path / "one")
    np.testing.assert_allclose(one.theta.detach().numpy(), expected, rtol=2e-6)
    train(split, 6, tmp_path / "split", micro_batch=3)
    np.testing.assert_allclose(split.theta.detach().numpy(), expected, rtol=2e-6)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, 5, tmp_path / "resumed")
    again = Two()
    train(again, 6, tmp_path / "resumed")
    assert torch.equal(again.theta, one.theta)


def test_reptile_sees_its_own_steps_in_bf16(events: Emitter) -> None:
    model = model_of("llama", AutoModelForSequenceClassification, num_labels=3)
    batch = {k: v[None].expand(30, *v.shape) for k, v in rows(6).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = Inner(SequenceClassification(), 1e-2).adapt(model, batch)
    assert float(losses[-1]) < 0.2 * float(losses[0]), "autocast keeps no copies of the weights as they were"
    assert F.cross_entropy(model(**{k: v for k, v in rows(6).items() if k != "labels"}).logits, rows(6)["labels"]) < 0.5
