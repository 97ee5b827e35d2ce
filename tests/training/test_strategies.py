"""Strategies inside the Trainer: penalties against autograd in fp64, unfreezing as a function of the step, replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fledge.core.events import Emitter, Event
from fledge.data.tokens.batches import ConversationBatches
from fledge.records.chat import Rendered
from fledge.training.objective import Batch, Term, as_batch
from fledge.training.objectives.causal_lm import CausalLM
from fledge.training.strategies.depth import depths, layers_of
from fledge.training.strategies.fisher import fisher_diagonal
from fledge.training.strategies.penalty import L2SP, ElasticWeights
from fledge.training.strategies.replay import SOURCE, OneByOne, Replayed, laid_end_to_end, side_by_side, stacked
from fledge.training.strategies.settings import Unfreeze
from fledge.training.strategies.unfreezing import Thaw
from tests.training.test_trainer import Killed, trainer, weights
from tests.training.toys import Packed, tiny


def rows(count: int, seed: int = 3) -> list[dict[str, Tensor]]:
    """Batches of one row of uneven lengths, some of whose tokens are not learned."""
    found = []
    for number in range(count):
        batch = as_batch(Packed(rows=1, length=12 + number % 5, seed=seed).batch(number))
        batch["labels"][0, : number % 4] = -100
        found.append({name: batch[name] for name in ("input_ids", "labels")} | {"attention_mask": batch["input_ids"]})
    return found


def plain_nll(model: Any, row: Batch) -> Tensor:
    """Σ −log p of a row by transformers' own logits."""
    logits = model(input_ids=row["input_ids"], use_cache=False).logits[:, :-1].double()
    total: Tensor = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), row["labels"][:, 1:].flatten(), reduction="sum"
    )
    return total


# --- penalties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_a_penalty_s_value_and_gradient_are_autograd_s_in_fp64(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in {"a": (3, 5), "b": (7,), "frozen": (2, 2), "new": (4,)}.items()
    }
    start = {name: p.detach().clone() for name, p in parameters.items()}
    fisher = {name: torch.rand(p.shape, generator=generator, dtype=torch.float64) for name, p in parameters.items()}
    del fisher["new"]  # EWC knows nothing of what the old task did not have
    penalty = ElasticWeights(2.5, dict(fisher)) if weighted else L2SP(2.5)
    penalty.hold(parameters)
    for parameter in parameters.values():
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    parameters["frozen"].requires_grad_(False)
    parameters["a"].grad = torch.ones_like(parameters["a"])  # of the objective

    counted = {n: p for n, p in parameters.items() if p.requires_grad and (n in fisher or not weighted)}
    value = torch.stack(
        [((fisher[n] if weighted else 1.0) * (p - start[n]) ** 2).sum() for n, p in counted.items()]
    ).sum() * (2.5 / 2)
    expected = dict(zip(counted, torch.autograd.grad(value, list(counted.values())), strict=True))
    assert penalty.add(parameters) == pytest.approx(float(value), rel=1e-14)
    for name, gradient in expected.items():
        mine = parameters[name].grad - (1.0 if name == "a" else 0.0)  # type: ignore[operator]
        torch.testing.assert_close(mine, gradient, rtol=1e-13, atol=1e-13)
    assert parameters["frozen"].grad is None and (parameters["new"].grad is None) == weighted


class Held(CausalLM):
    """The language model's loss with an L2-SP term that autograd differentiates."""

    def __init__(self, model: Any, alpha: float) -> None:
        super().__init__()
        self.alpha, self.start = alpha, [p.detach().clone() for p in model.parameters()]

    def weights(self, batch: Batch) -> dict[str, float]:
        return {**super().weights(batch), "pull": 1.0}

    def forward(self, models: Mapping[str, Any], batch: Batch) -> Any:
        moved = zip(models["model"].parameters(), self.start, strict=True)
        return super().forward(models, batch), torch.stack([((p - s) ** 2).sum() for p, s in moved]).sum() / 2

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        inner, pull = outputs
        return {**super().loss(inner, batch), "pull": Term(pull, 1.0, self.alpha)}


def test_the_trainer_adds_it_once_whatever_the_micro_batch(events: Emitter, heard: list[Event]) -> None:
    """The same run as one whose objective holds the term; 0.5 is so strong that a second helping would show."""
    options: dict[str, Any] = {"steps": 8, "l2_sp": 0.5, "grad_clip": 0.7}
    found = {}
    for size in (0, 2, 5):
        model = tiny()
        trainer(model, events, micro_batch=size, **options).fit()
        found[size] = torch.cat([p.detach().flatten() for p in model.parameters()])
    values = [float(e.value) for e in heard if e.name == "l2_sp"][:8]
    reference = tiny()
    trainer(reference, events, objective=Held(reference, 0.5), steps=8, grad_clip=0.7).fit()
    expected = torch.cat([p.detach().flatten() for p in reference.parameters()])
    free = tiny()
    trainer(free, events, steps=8, grad_clip=0.7).fit()
    far = float((torch.cat([p.detach().flatten() for p in free.parameters()]) - expected).norm())
    for size, flat in found.items():
        assert float((flat - expected).norm()) < 2e-3 * far, size
    pulls = [float(e.value) for e in heard if e.name == "pull"]
    assert values[0] == 0 and values == pytest.approx([p * 0.5 for p in pulls], rel=1e-4)
    losses = [float(e.value) for e in heard if e.name == "loss"]
    assert losses[:8] == pytest.approx([v - 0.5 * p for v, p in zip(losses[24:32], pulls, strict=True)], rel=1e-5)


def test_a_run_that_is_held_resumes_to_the_same_bytes(tmp_path: Path, events: Emitter) -> None:
    class Dies(Packed):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.at = at

        def batch(self, step: int) -> Any:
            if step == self.at:
                raise Killed
            return super().batch(step)

    def run(model: Any, folder: Path, dies_at: int = -1) -> None:
        fisher = {f"model.{name}": torch.ones_like(p) / 7 for name, p in model.named_parameters() if "mlp" in name}
        made = trainer(
            model, events, steps=12, folder=folder, source=Dies(dies_at), checkpoint_every=3, l2_sp=0.1,
            unfreeze={"every": 4},
        )  # fmt: skip
        made.penalties = [ElasticWeights(0.3, fisher)]
        made.fit()
        assert all(p.requires_grad for p in model.parameters())

    whole = tiny()
    run(whole, tmp_path / "whole")
    for dies_at in (5, 10):
        folder, again = tmp_path / str(dies_at), tiny()
        with pytest.raises(Killed):
            run(tiny(), folder, dies_at)
        run(again, folder)
        assert weights(again) == weights(whole), dies_at


def test_a_run_that_returns_forgets_what_joined_since(tmp_path: Path, events: Emitter) -> None:
    """Back from step 13 to step 6, at which the lower layer had no moments: as a process that begins there."""

    class Astray(CausalLM):
        """The 9th to the 13th step have no finite loss."""

        asked = 0

        def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
            self.asked += 1
            bad = float("nan") if 9 <= self.asked <= 13 else 1.0
            return {n: Term(term.sum * bad, term.weight) for n, term in super().loss(outputs, batch).items()}

    class Dies(Packed):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.left = at

        def batch(self, step: int) -> Any:
            self.left -= 1
            if not self.left:
                raise Killed
            return super().batch(step)

    def run(folder: Path, dies_after: int = -1, well: bool = False) -> Any:
        model = tiny(layers=3)
        objective = Astray()
        objective.asked = 100 * well
        made = trainer(
            model, events, steps=20, source=Dies(dies_after), folder=folder, objective=objective, checkpoint_every=6,
            unfreeze={"every": 3}, statistics_every=2,
        )  # fmt: skip
        assert made.fit()["rollbacks"] == 1
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", dies_after=16)
    assert weights(run(tmp_path / "killed", well=True)) == weights(whole)


# --- Fisher information ----------------------------------------------------------------------------------------------


def test_fisher_is_the_mean_of_squared_gradients_of_single_rows_in_fp64() -> None:
    model, data = tiny().double().train(), rows(5)
    found = fisher_diagonal(model, data)
    assert model.training and all(p.grad is None for p in model.parameters())
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for row in data:
        gradients = torch.autograd.grad(plain_nll(model, row), list(model.parameters()))
        for (name, total), gradient in zip(expected.items(), gradients, strict=True):
            expected[name] = total + gradient**2
    tokens = sum(int((row["labels"][:, 1:] >= 0).sum()) for row in data)
    together = torch.autograd.grad(torch.stack([plain_nll(model, row) for row in data]).sum(), list(model.parameters()))
    assert set(found) == set(expected) and tokens > 40
    for name, total in expected.items():
        torch.testing.assert_close(found[name], total / tokens, rtol=1e-6, atol=1e-10)
    (squared, apart) = zip(*((g**2, t) for g, t in zip(together, expected.values(), strict=True)), strict=True)
    away = sum(float(((a - b) ** 2).sum()) for a, b in zip(squared, apart, strict=True))
    assert away > 0.05 * sum(float((b**2).sum()) for b in apart), "the batch's gradient squared would be another"


def test_fisher_goes_on_where_it_was_killed_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.training.strategies.fisher.SECONDS_BETWEEN_SAVES", 0.0)
    data, file, asked = rows(6), tmp_path / "fisher.safetensors", []
    whole = fisher_diagonal(tiny(), data)

    def dies(done: int, total: int) -> None:
        asked.append(done)
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        fisher_diagonal(tiny(), data, file, progress=dies)
    asked.clear()
    again = fisher_diagonal(tiny(), data, file, progress=lambda done, total: asked.append(done))
    assert asked == [4, 5, 6], "three rows were kept"
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    asked.clear()
    fisher_diagonal(tiny(), data, file, progress=lambda done, total: asked.append(done))
    assert asked == []
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(fisher_diagonal(tiny(), data, file)["model.norm.weight"], whole["model.norm.weight"])


# --- unfreezing ------------------------------------------------------------------------------------------------------


def test_layers_join_from_the_head_downwards(events: Emitter, heard: list[Event]) -> None:
    before = {name: p.detach().clone() for name, p in tiny(layers=3).named_parameters()}

    def moved(steps: int, **settings: Any) -> set[str]:
        """The parts that have changed after so many steps."""
        made = tiny(layers=3)
        run = trainer(made, events, steps=steps, weight_decay=0.1, l2_sp=0.1, schedule="constant", **settings)
        run.fit()
        names = [name for name, p in made.named_parameters() if not torch.equal(p.detach(), before[name])]
        return {name.removeprefix("model.").rpartition(".")[0].split(".self")[0].split(".mlp")[0] for name in names}

    head = {"norm"}  # the output layer is tied to the embeddings
    every = {"unfreeze": {"every": 2}}

    def layer(*numbers: int) -> set[str]:
        parts = ("", ".input_layernorm", ".post_attention_layernorm")
        return {f"layers.{n}{part}" for n in numbers for part in parts}

    assert moved(2, **every) == head | layer(2)
    assert moved(3, **every) == head | layer(2, 1)
    assert moved(6, **every) == head | layer(2, 1, 0)
    assert moved(7, **every) == head | layer(2, 1, 0) | {"embed_tokens"}
    assert moved(4, unfreeze={"every": 0.5, "layers": 2}) == head | layer(2, 1, 0) | {"embed_tokens"}
    assert any("never trained" in str(e.value) for e in heard if e.kind == "message" and e.name == "warning")


def test_what_joins_late_begins_as_if_it_had_not_been_there(events: Emitter) -> None:
    """The moments of a layer that joins begin then: its first step is Adam's first, of the full rate."""
    model = tiny()
    run = trainer(model, events, steps=5, unfreeze={"every": 4}, schedule="constant", warmup=0, grad_clip=0.0)
    start = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    run.fit()
    step = (model.model.layers[0].mlp.up_proj.weight.detach() - start).abs()
    assert float(step[step > 0].median()) == pytest.approx(3e-3, rel=0.35), "lr · sign, with decay 0.1 beside it"


def test_something_is_trained_at_all_times() -> None:
    model = tiny(layers=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.0." in name or "embed" in name)
    parameters = {f"model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    thaw = Thaw(Unfreeze(every=10), {"model": model}, parameters, 100)
    assert {thaw.depths[n] for n in parameters if thaw.trains(n, 0)} == {3}
    assert not thaw.never and all(thaw.trains(n, 30) for n in parameters)
    assert [name for name in parameters if not thaw.trains(name, 29)] == ["model.model.embed_tokens.weight"]


def families() -> dict[str, Any]:
    """A tiny model of every way of naming layers."""
    import transformers as tf

    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    wide = {**small, "intermediate_size": 32}
    made = {
        "gpt2": tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2)),
        "bloom": tf.BloomForCausalLM(tf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=3, n_head=2)),
        "qwen3": tf.Qwen3ForCausalLM(tf.Qwen3Config(**wide, num_key_value_heads=2, head_dim=8)),
        "neox": tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**wide)),
        "bert": tf.BertForSequenceClassification(tf.BertConfig(**wide)),
        "roberta": tf.RobertaForMaskedLM(tf.RobertaConfig(**wide)),
        "electra": tf.ElectraForPreTraining(tf.ElectraConfig(**wide, embedding_size=8)),
        "deberta": tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**wide, relative_attention=True)),
        "t5": tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2)
        ),
        "bart": tf.BartForConditionalGeneration(
            tf.BartConfig(
                vocab_size=40, d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
            )
        ),
    }  # fmt: skip
    return made


EXPECTED = {
    "gpt2": {"transformer.wte.weight": 4, "transformer.wpe.weight": 4, "transformer.h.0.ln_1.weight": 3,
             "transformer.h.2.mlp.c_fc.weight": 1, "transformer.ln_f.weight": 0},
    "bloom": {"transformer.word_embeddings.weight": 4, "transformer.word_embeddings_layernorm.weight": 4,
              "transformer.h.1.self_attention.dense.weight": 2, "transformer.ln_f.bias": 0},
    "qwen3": {"model.embed_tokens.weight": 4, "model.layers.0.self_attn.q_norm.weight": 3, "model.norm.weight": 0,
              "lm_head.weight": 0},
    "neox": {"gpt_neox.embed_in.weight": 4, "gpt_neox.layers.2.mlp.dense_h_to_4h.weight": 1,
             "gpt_neox.final_layer_norm.weight": 0, "lm_head.weight": 0},
    "bert": {"bert.embeddings.position_embeddings.weight": 4, "bert.embeddings.LayerNorm.weight": 4,
             "bert.encoder.layer.0.output.dense.weight": 3, "bert.pooler.dense.weight": 0, "classifier.weight": 0},
    "roberta": {"roberta.embeddings.LayerNorm.bias": 4, "roberta.encoder.layer.2.output.dense.weight": 1,
                "lm_head.dense.weight": 0},
    "electra": {"electra.embeddings_project.weight": 4, "electra.encoder.layer.1.output.dense.bias": 2,
                "discriminator_predictions.dense.weight": 0},
    "deberta": {"deberta.encoder.rel_embeddings.weight": 4, "deberta.embeddings.word_embeddings.weight": 4,
                "deberta.encoder.layer.0.attention.self.query_proj.weight": 3},
    "t5": {"shared.weight": 6, "encoder.block.0.layer.0.SelfAttention.q.weight": 5,
           "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 5,
           "encoder.block.2.layer.1.DenseReluDense.wi.weight": 3, "encoder.final_layer_norm.weight": 3,
           "decoder.block.0.layer.1.EncDecAttention.q.weight": 2, "decoder.block.1.layer.0.layer_norm.weight": 1,
           "decoder.final_layer_norm.weight": 0},
    "bart": {"model.shared.weight": 6, "model.encoder.embed_positions.weight": 6,
             "model.encoder.layernorm_embedding.weight": 6, "model.decoder.embed_positions.weight": 6,
             "model.encoder.layers.0.fc1.weight": 5, "model.encoder.layers.2.fc1.weight": 3,
             "model.decoder.layers.0.fc1.weight": 2, "model.decoder.layers.1.encoder_attn.k_proj.weight": 1},
}  # fmt: skip


def test_every_family_s_layers_stand_where_they_are() -> None:
    made = families()
    assert set(made) == set(EXPECTED)
    for family, model in made.items():
        found = depths(model)
        assert layers_of(model) == (5 if family in ("t5", "bart") else 3), family
        for name, below in EXPECTED[family].items():
            assert name in found and found[name] == below, (family, name)
        assert set(found.values()) >= set(range(1, layers_of(model) + 2)), family


def test_adapters_stand_where_their_layers_do() -> None:
    from fledge.models.adapters import LoRA, add_lora

    found = depths(add_lora(tiny(layers=3), LoRA(rank=2), 0))
    lora = {name: below for name, below in found.items() if "lora_" in name}
    assert lora and all(below == 3 - int(name.split("layers.")[1][0]) for name, below in lora.items())


# --- replay ----------------------------------------------------------------------------------------------------------


class Rows:
    """Batches of one row; every token of row i is 100 · corpus + i."""

    def __init__(self, corpus: int, count: int = 5, masked: bool = True) -> None:
        self.corpus, self.count, self.masked = corpus, count, masked

    def __len__(self) -> int:
        return self.count

    def batch(self, step: int) -> dict[str, np.ndarray]:
        length = 3 + (step + self.corpus) % 4 if self.masked else 6
        ids = np.full((1, length), 1000 * self.corpus + step, dtype=np.int64)
        arrays = {"input_ids": ids, "labels": ids.copy(), "position_ids": np.arange(length)[None]}
        return arrays | ({"attention_mask": np.ones_like(ids)} if self.masked else {})


@pytest.mark.parametrize("share, size", [(0.1, 4), (0.25, 8), (0.3, 7), (0.9, 3), (0.5, 1)])
def test_the_share_is_exact_at_every_step_and_every_row_comes_in_its_turn(share: float, size: int) -> None:
    source = Replayed(Rows(0), [Rows(1), Rows(2)], share, size, ("new", "a", "b"), 9999)
    seen: list[list[int]] = [[], [], []]
    for step in range(30):
        batch = source.batch(step)
        assert len(batch[SOURCE]) == size and batch["input_ids"].shape[0] == size
        for origin, ids, labels, mask, positions in zip(
            batch[SOURCE], batch["input_ids"], batch["labels"], batch["attention_mask"], batch["position_ids"],
            strict=True,
        ):  # fmt: skip
            whole = mask == 1
            assert (
                (ids[whole] // 1000 == origin).all() and (ids[~whole] == 9999).all() and (labels[~whole] == -100).all()
            )
            assert positions.tolist() == list(range(len(ids)))
            seen[origin].append(int(ids[0]) % 1000)
        rows_so_far = (step + 1) * size
        assert len(seen[1]) + len(seen[2]) == int(rows_so_far * Fraction(str(share)))
        assert 0 <= len(seen[1]) - len(seen[2]) <= 1, "the old corpora take turns"
    assert all(rows == list(range(len(rows))) for rows in seen), "nothing is passed over, nothing comes twice"
    again = source.batch(17)
    source.batch(3)
    assert all(np.array_equal(again[name], value) for name, value in source.batch(17).items())


def test_an_epoch_ends_with_the_new_rows() -> None:
    source = Replayed(Rows(0, count=90), [Rows(1)], 0.1, 10, ("new", "old"))
    assert len(source) == 10
    assert sum(int((source.batch(step)[SOURCE] == 0).sum()) for step in range(10)) == 90


def test_packed_rows_are_stacked_as_they_are() -> None:
    made = stacked([Rows(0, masked=False).batch(0), Rows(1, masked=False).batch(1)], 0)
    assert set(made) == {"input_ids", "labels", "position_ids"} and made["input_ids"].shape == (2, 6)


def test_conversations_laid_end_to_end_say_of_every_token_where_it_comes_from() -> None:
    def told(corpus: int, count: int) -> OneByOne:
        rows = [Rendered([100 * corpus + 1 + i] * (4 + i % 5), [0.0, *[1.0] * (3 + i % 5)]) for i in range(count)]
        return OneByOne(ConversationBatches(rows, 1, 7, 9999, corpus))

    source = Replayed(told(0, 20), [told(1, 6), told(2, 6)], 0.5, 8, ("new", "a", "b"), laid_end_to_end(7, 9999, 20))
    seen = Counter[int]()
    for step in range(10):
        batch = source.batch(step)
        assert batch[SOURCE].shape == batch["input_ids"].shape == batch["position_ids"].shape
        real = batch["input_ids"] != 9999
        assert (batch["input_ids"][real] // 100 == batch[SOURCE][real]).all() and len(batch["input_ids"]) < 8
        assert (batch["labels"][~real] == -100).all() and "attention_mask" not in batch
        starts = real & (batch["position_ids"] == 0)
        seen.update((batch["input_ids"][starts] // 100).tolist())
    assert seen == {0: 40, 1: 20, 2: 20}
    padded = Replayed(told(0, 20), [told(1, 6)], 0.25, 8, ("new", "a"), side_by_side(7, 9999)).batch(0)
    assert padded[SOURCE].tolist() == [0] * 6 + [1] * 2 and (padded["input_ids"][:, 0] // 100 == padded[SOURCE]).all()
