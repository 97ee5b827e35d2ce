"""The objectives of pre-training against transformers' losses in float64: values, gradients, documents kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fledge.cli.stage_command import leaves
from fledge.core.events import Emitter
from fledge.data.tokens.batches import Batch
from fledge.data.tokens.corruption.chance import Corrupted
from fledge.data.tokens.corruption.masking import Masking
from fledge.training.likelihood import Head
from fledge.training.objective import Objective, as_batch
from fledge.training.objectives.bidirectional import (
    add_absolute_positions,
    encoder_states,
    head_over_vocabulary,
    seq2seq_states,
)
from fledge.training.objectives.config import Masked, read_objective, write_objective
from fledge.training.objectives.denoising import Denoising
from fledge.training.objectives.masked_lm import MaskedLM
from fledge.training.objectives.replaced_token import Electra, ReplacedToken, sampled
from fledge.training.objectives.span_corruption import SpanCorruption
from fledge.training.stages import Continue, Pretrain
from fledge.training.trainer import Trainer
from tests.training.toys import settings

VOCAB, LENGTH = 90, 18
SHAPE = {"vocab_size": VOCAB, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
COMMON = {**SHAPE, "hidden_size": 32, "max_position_embeddings": 40, "pad_token_id": 1}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DEBERTA = {
    "relative_attention": True, "position_buckets": 6, "position_biased_input": False, "type_vocab_size": 0,
    "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
}  # fmt: skip


def noisy(model: Any, seed: int = 0) -> Any:
    """The model in float64 with noise on everything, biases and norms too: nothing is 0 or 1 by chance."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05)
    return model


def encoder(family: str) -> Any:
    made = {
        "bert": lambda: BertForMaskedLM(BertConfig(**COMMON, **STILL)),
        "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**COMMON, **STILL)),
        "electra": lambda: ElectraForMaskedLM(ElectraConfig(**COMMON, **STILL, embedding_size=16)),
        "deberta": lambda: DebertaV2ForMaskedLM(DebertaV2Config(**COMMON, **STILL, **DEBERTA)),
        "deberta-own-head": lambda: DebertaV2ForMaskedLM(DebertaV2Config(**COMMON, **STILL, **DEBERTA, legacy=False)),
        "deberta-conv": lambda: DebertaV2ForMaskedLM(DebertaV2Config(**COMMON, **STILL, **DEBERTA, conv_kernel_size=3)),
    }
    return noisy(made[family]())


def seq2seq(family: str) -> Any:
    if family == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        return noisy(T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes, pad_token_id=1)))
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40}
    model = noisy(
        BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, **sizes, **heads, pad_token_id=1, dropout=0))
    )
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(3))
    return model


def masked_rows(rows: int = 6, seed: int = 0, pad: bool = False) -> dict[str, Tensor]:
    """Rows with uneven labels, one of them with none; with `pad`, on the right."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, VOCAB, (rows, LENGTH))
    labels = np.where(rng.random((rows, LENGTH)) < np.linspace(0, 0.7, rows)[:, None], ids, -100)
    labels[:, 5] = np.where(np.arange(rows) % 2, ids[:, 5], -100)
    mask = np.ones_like(ids)
    if pad:
        mask = (np.arange(LENGTH) < rng.integers(8, LENGTH + 1, (rows, 1))).astype(np.int64)
        ids, labels = np.where(mask, ids, 1), np.where(mask, labels, -100)
    positions = np.tile(np.arange(LENGTH), (rows, 1))
    uniforms = rng.random((rows, LENGTH)).astype(np.float32)
    made = {"input_ids": ids, "labels": labels, "position_ids": positions, "uniforms": uniforms}
    return as_batch({**made, "attention_mask": mask} if pad else made)


def translated_rows(rows: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Inputs and targets of other lengths, uneven labels, padding in the inputs."""
    rng = np.random.default_rng(seed)
    ids, targets = rng.integers(4, VOCAB, (rows, LENGTH)), rng.integers(4, VOCAB, (rows, 7))
    real = np.arange(LENGTH) < rng.integers(8, LENGTH + 1, (rows, 1))
    labels = np.where(np.arange(7) < rng.integers(1, 8, (rows, 1)), targets, -100)
    return as_batch(
        {
            "input_ids": np.where(real, ids, 1), "documents": real.astype(np.int64), "labels": labels,
            "decoder_input_ids": rng.integers(4, VOCAB, (rows, 7)), "decoder_documents": np.ones((rows, 7), np.int64),
        }
    )  # fmt: skip


def gradients(model: Any) -> Tensor:
    found = torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])
    model.zero_grad()
    return found


def ours(objective: Objective, model: Any, batch: Mapping[str, Tensor], micro: int = 0) -> tuple[float, Tensor]:
    """The loss and its gradients, from micro-batches as the Trainer takes them."""
    totals, size, loss = objective.weights(batch), micro or len(batch["labels"]), 0.0
    for start in range(0, len(batch["labels"]), size):
        part = {name: value[start : start + size] for name, value in batch.items()}
        terms = objective.loss(objective.forward({"model": model}, part), part)
        parts = [term.coefficient * term.sum / totals[name] for name, term in terms.items() if term.coefficient]
        total = torch.stack(parts).sum()
        if total.requires_grad:
            total.backward()
        loss += float(total.detach())
    return loss, gradients(model)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta", "deberta-own-head", "deberta-conv"])
def test_masked_lm_is_transformers_own(family: str, pad: bool) -> None:
    model, batch = encoder(family), masked_rows(pad=pad)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    expected = model(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"]).loss
    expected.backward()
    reference = gradients(model)
    for micro in (0, 1, 4):
        loss, found = ours(MaskedLM(), model, batch, micro)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
        assert float((found - reference).norm() / reference.norm()) < 1e-10, micro


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_sequence_to_sequence_is_transformers_own(family: str) -> None:
    model, batch = seq2seq(family), translated_rows()
    expected = model(
        input_ids=batch["input_ids"], attention_mask=batch["documents"],
        decoder_input_ids=batch["decoder_input_ids"], labels=batch["labels"],
    ).loss  # fmt: skip
    expected.backward()
    reference = gradients(model)
    for micro, objective in ((0, SpanCorruption()), (2, Denoising())):
        loss, found = ours(objective, model, batch, micro)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
        assert float((found - reference).norm() / reference.norm()) < 1e-10


def test_what_is_measured_is_the_share_guessed_right() -> None:
    model, batch = encoder("bert"), masked_rows()
    logits = model(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"])).logits
    right = ((logits.argmax(-1) == batch["labels"]) & (batch["labels"] >= 0)).sum()
    with torch.no_grad():
        terms = MaskedLM().loss(MaskedLM().forward({"model": model}, batch), batch)
    assert float(terms["accuracy"].sum) == float(right) and terms["accuracy"].coefficient == 0
    terms = MaskedLM().loss(MaskedLM().forward({"model": model}, batch), batch)
    assert set(terms) == {"nll"}, "nothing is guessed while gradients are made"


def packed(documents: list[Tensor]) -> dict[str, Tensor]:
    """One row of several documents."""
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta", "deberta-conv"])
def test_documents_of_a_row_do_not_see_each_other(family: str) -> None:
    model, rng = encoder(family), np.random.default_rng(1)
    if family == "deberta":
        add_absolute_positions(model.float(), 3)
        model.double()
    documents = [torch.tensor(rng.integers(4, VOCAB, size)) for size in (7, 3, 11)]
    together = encoder_states(model, packed(documents))[0]
    alone = torch.cat([encoder_states(model, packed([document]))[0] for document in documents])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_documents_of_an_encoder_decoder_do_not_see_each_other(family: str) -> None:
    model, rng = seq2seq(family), np.random.default_rng(2)
    sizes = [(6, 3), (4, 5), (8, 2)]
    parts = [(torch.tensor(rng.integers(4, VOCAB, n)), torch.tensor(rng.integers(4, VOCAB, m))) for n, m in sizes]

    def states(some: list[tuple[Tensor, Tensor]]) -> Tensor:
        number = torch.arange(1, len(some) + 1)
        return seq2seq_states(
            model,
            {
                "input_ids": torch.cat([a for a, _ in some])[None],
                "decoder_input_ids": torch.cat([b for _, b in some])[None],
                "documents": number.repeat_interleave(torch.tensor([len(a) for a, _ in some]))[None],
                "decoder_documents": number.repeat_interleave(torch.tensor([len(b) for _, b in some]))[None],
            },
        )[0]

    torch.testing.assert_close(states(parts), torch.cat([states([part]) for part in parts]), rtol=1e-10, atol=1e-12)


# --- ELECTRA ---------------------------------------------------------------------------------------------------------


def pair() -> Electra:
    small = {**COMMON, "hidden_size": 16, "num_attention_heads": 2, "embedding_size": 32}
    generator = ElectraForMaskedLM(ElectraConfig(**small, **STILL))
    discriminator = ElectraForPreTraining(ElectraConfig(**COMMON, **STILL, embedding_size=32))
    return noisy(Electra(generator, discriminator))  # type: ignore[no-any-return]


@pytest.mark.parametrize("pad", [False, True])
def test_replaced_token_detection_is_the_sum_of_transformers_losses(pad: bool) -> None:
    model, batch = pair(), masked_rows(rows=6, seed=3, pad=pad)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    about = {"attention_mask": mask, "position_ids": batch["position_ids"]}
    made = model.generator(input_ids=batch["input_ids"], labels=batch["labels"], **about)
    at = batch["labels"] >= 0
    ends = made.logits[at].softmax(-1).cumsum(-1)
    guessed = (ends < batch["uniforms"][at].double()[:, None]).sum(-1)  # where the distribution passes the number
    read = batch["input_ids"].clone()
    read[at] = guessed
    original = torch.where(at, batch["labels"], batch["input_ids"])
    found = model.discriminator(input_ids=read, labels=(read != original).long(), **about)
    wrong = (read != original).double()
    exact = -(wrong * F.logsigmoid(found.logits) + (1 - wrong) * F.logsigmoid(-found.logits))[mask > 0].mean()
    assert float(found.loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6), "theirs ends in float32"
    expected = made.loss + 50 * exact
    expected.backward()
    reference = gradients(model)
    for micro in (0, 1, 4):
        loss, ours_ = ours(ReplacedToken(), model, batch, micro)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-10)
        assert float((ours_ - reference).norm() / reference.norm()) < 1e-9


def test_the_discriminator_teaches_the_generator_nothing_but_embeddings() -> None:
    model, batch = pair(), masked_rows(seed=3)
    objective = ReplacedToken()
    terms = objective.loss(objective.forward({"model": model}, batch), batch)
    (terms["discriminator"].sum / 10).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}
    assert touched and all(name.startswith("discriminator.") for name in touched)
    shared = model.generator.electra.embeddings.word_embeddings.weight
    assert shared is model.discriminator.electra.embeddings.word_embeddings.weight
    assert shared is model.generator.generator_lm_head.weight
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith("generator.electra.embeddings.") for name in names), "each is trained once"


def test_its_measures_are_counts_of_right_and_wrong() -> None:
    model, batch = pair(), masked_rows(seed=5, pad=True)
    nll, logits, replaced = ReplacedToken().forward({"model": model}, batch)
    terms = ReplacedToken().loss((nll, logits, replaced), batch)
    real = batch["attention_mask"] > 0
    said, true = (logits > 0)[real], replaced[real]
    hits = int((said & true).sum())
    precision, recall = hits / max(1, int(said.sum())), hits / int(true.sum())
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    assert float(terms["f1"].sum) / float(terms["f1"].weight) == pytest.approx(f1)
    assert float(terms["accuracy"].sum) / float(terms["accuracy"].weight) == pytest.approx(
        float((said == true).double().mean())
    )


def test_tokens_are_sampled_as_the_softmax_says() -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    state = torch.randn(1, 4, dtype=torch.float64)
    chances = torch.softmax(state @ head.weight.T + head.bias, -1)[0]
    numbers = (torch.arange(20_000) + 0.5) / 20_000
    found = sampled(state.expand(20_000, 4), head, numbers)
    torch.testing.assert_close(torch.bincount(found, minlength=6) / 20_000, chances.float(), atol=1e-4, rtol=0)


# --- DeBERTa's enhanced mask decoder ---------------------------------------------------------------------------------


def test_absolute_positions_are_told_in_pretraining_only(tmp_path: Path) -> None:
    """He et al. (2021), section 3.2, against the last layer called by hand; the saved folder loads without them."""
    torch.manual_seed(0)
    model = DebertaV2ForMaskedLM(DebertaV2Config(**COMMON, **STILL, **DEBERTA)).eval()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    batch = masked_rows()
    before = encoder_states(model, batch)
    add_absolute_positions(model, 7)
    found = encoder_states(model, batch)
    assert float((found - before).detach().abs().max()) > 1e-3

    body, mask = model.deberta, torch.ones_like(batch["input_ids"])
    below = body(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    table = body.embeddings.position_embeddings.weight
    relative = body.encoder.get_rel_pos(below)
    query = below + table[:LENGTH]
    whole = torch.ones(len(mask), 1, LENGTH, LENGTH, dtype=torch.bool)
    for _ in range(2):
        query = body.encoder.layer[-1](
            below, whole, query_states=query, relative_pos=relative, rel_embeddings=body.encoder.get_rel_embedding()
        )[0]
    torch.testing.assert_close(found, query, rtol=1e-5, atol=1e-6)

    swapped = {**batch, "position_ids": batch["position_ids"].flip(1)}
    assert float((encoder_states(model, swapped) - found).detach().abs().max()) > 1e-3, "the table is looked up"
    model.save_pretrained(tmp_path)
    loaded, about = DebertaV2ForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"] and not about["mismatched_keys"]
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(encoder_states(loaded.eval(), batch), before)


# --- in the Trainer --------------------------------------------------------------------------------------------------


class Rows:
    """Rows of a pattern that can be learned, two documents each, the same for ever."""

    def __len__(self) -> int:
        return 2

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng(step % 2)
        ids = 4 + (rng.integers(0, 20, (8, 1)) + np.arange(LENGTH)) % 20
        positions = np.tile(np.arange(LENGTH) % 9, (8, 1))
        return Batch(ids, ids.copy(), positions)


class Killed(Exception):
    """The run ends here."""


class Mortal(Corrupted):
    """A source that fails at a step."""

    until = 100

    def batch(self, step: int) -> dict[str, Any]:
        if step >= self.until:
            raise Killed
        return super().batch(step)


@pytest.mark.parametrize("objective", ["masked", "replaced_token"])
def test_a_resumed_run_is_the_uninterrupted_one(objective: str, tmp_path: Path, events: Emitter) -> None:
    special = np.arange(VOCAB) < 4

    def run(folder: Path, until: int, micro: int = 0) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(1)
        if objective == "masked":
            model: Any = BertForMaskedLM(BertConfig(**COMMON))
        else:
            small = {**COMMON, "hidden_size": 16, "num_attention_heads": 2, "embedding_size": 32}
            discriminator = ElectraForPreTraining(ElectraConfig(**COMMON, embedding_size=32))
            model = Electra(ElectraForMaskedLM(ElectraConfig(**small)), discriminator)
        source = Mortal(Rows(), Masking(3, special, 9, keep=0.1, random=0.1))
        source.until = until
        given = settings(lr=1e-2, checkpoint_every=3)
        page = MaskedLM() if objective == "masked" else ReplacedToken()
        trainer = Trainer(page, {"model": model}, source, given, 12, 3, events, checkpoints=folder, micro_batch=micro)
        return model, trainer.fit()

    whole, metrics = run(tmp_path / "whole", 100)
    with pytest.raises(Killed):
        run(tmp_path / "killed", 8)
    resumed, again = run(tmp_path / "killed", 100)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert metrics["final_loss"] == again["final_loss"]


# --- what a recipe may say -------------------------------------------------------------------------------------------


def test_objectives_are_named_and_their_options_checked() -> None:
    assert write_objective(read_objective("causal")) == "causal"
    masked = read_objective({"masked": {"rate": 0.2, "whole_word": True}})
    assert isinstance(masked, Masked) and read_objective(write_objective(masked)) == masked
    for wrong, said in (
        ("maskd", 'no objective "maskd"'),
        ({"masked": {"rte": 0.2}}, 'no option "rte"'),
        ({"masked": {"rate": 2}}, "rate: Input should be less than 1"),
        ({"masked": {"keep": 0.6, "random": 0.5}}, "at most 1 together"),
        (["masked"], "must be the name"),
    ):
        with pytest.raises(ValueError, match=said):
            read_objective(wrong)


def test_an_objective_that_does_not_fit_the_model_is_refused_before_anything_loads() -> None:
    def problems(objective: Any, family: str, **more: Any) -> list[str]:
        shape = {"family": family, "hidden": 32, "layers": 2}
        stage = Pretrain(data=["d"], tokenizer="t", tokens=1000, model=shape, objective=objective, **more)
        return [problem.what for problem in stage.check()]

    assert not problems("causal", "llama") and not problems("masked", "roberta") and not problems("denoising", "t5")
    for objective, family in (
        ("masked", "llama"), ("causal", "bert"), ("replaced_token", "bert"), ("span_corruption", "gpt2"),
        ("denoising", "electra"), ("causal", "bart"),
    ):  # fmt: skip
        assert "does not fit" in problems(objective, family)[0]
    assert "z_loss" in problems("masked", "bert", z_loss=1e-4)[0]
    shape = {"family": "electra", "hidden": 32, "layers": 2}
    asked = Pretrain(data=["d"], tokenizer="t", tokens=1000, model=shape, objective={"replaced_token": {"weight": 25}})
    assert Pretrain.model_validate(asked.config_values()) == asked, "as it is handed to the process that trains"
    going_on = Continue(model="m", data=["d"], tokens=1000, objective="replaced_token")
    assert "from scratch only" in next(going_on.check()).what
    for stage in (Pretrain, Continue):
        assert "objective" in {name for name, _, _ in leaves(stage)}, "it has a flag on the command line"
    with pytest.raises(ValidationError, match="no objective"):
        Continue(model="m", data=["d"], tokens=1000, objective="mlm")


def test_a_model_without_such_a_head_is_refused() -> None:
    with pytest.raises(Exception, match="no head"):
        head_over_vocabulary(ElectraForPreTraining(ElectraConfig(**COMMON)))
