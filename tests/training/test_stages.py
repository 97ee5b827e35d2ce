"""The stages as the runner calls them, on tiny data in both languages: what they write, and what they measure."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fledge.core.artifact import (
    Adapter,
    Artifact,
    Conversations,
    Documents,
    Model,
    Preferences,
    RewardModel,
    Tokenizer,
    files_of,
    sha256_of,
)  # fmt: skip
from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.stage import Execution
from fledge.models.stages import Merge
from fledge.records.kinds import Answer, Conversation, Document, Message, Preference
from fledge.records.shards import ShardWriter
from fledge.training.stages import SFT, DirectPreferences, Pretrain, RewardModelling
from tests.training.toys import tokenizer

Run = Callable[..., Any]
QUESTIONS = [("hello", "hello there"), ("who", "you are here"), ("你好", "你好人民"), ("法院", "人民法院")]
QUICK = {"batch_size": 8, "max_length": 64, "log_every": 5}


def write(folder: Path, kind: str, records: list[Any]) -> Path:
    with ShardWriter(folder, kind) as shards:
        for record in records:
            shards.write(record)
    return folder


def conversations(n: int, seed: int) -> list[Conversation]:
    picks = random.Random(seed).choices(QUESTIONS, k=n)
    return [
        Conversation((Message("user", f"{q} {i}"), Message("assistant", a)), language="zh" if a > "z" else "en")
        for i, (q, a) in enumerate(picks)
    ]


def preferences(n: int, seed: int) -> list[Preference]:
    """The answer above a shuffled one; every fourth prompt has three answers."""
    rng, found = random.Random(seed), []
    for i, (q, a) in enumerate(rng.choices(QUESTIONS, k=n)):
        letters = list(a)
        rng.shuffle(letters)
        answers = [Answer(a, 1), Answer("".join(letters) + "?", 2)] + [Answer("??", 3)] * (i % 4 == 0)
        found.append(Preference((Message("user", f"{q} {i}"),), tuple(answers), language="zh" if a > "z" else "en"))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Inputs by reference text, outputs of earlier stages added as they are made."""
    root = tmp_path_factory.mktemp("world")
    names = tokenizer()
    names.save_pretrained(root / "tokenizer")
    english = [Document(" ".join(["hello there you are here"] * (3 + i % 3))) for i in range(60)]
    chinese = [Document("你好人民法院。" * (3 + i % 4)) for i in range(60)]
    return {
        "tokenizer": Tokenizer(root / "tokenizer"),
        "en": Documents(write(root / "en", "documents", english)),
        "zh": Documents(write(root / "zh", "documents", chinese)),
        "chats": Conversations(write(root / "chats", "conversations", conversations(60, 1))),
        "chats_held": Conversations(write(root / "held", "conversations", conversations(12, 2))),
        "prefs": Preferences(write(root / "prefs", "preferences", preferences(40, 3))),
        "prefs_held": Preferences(write(root / "prefs_held", "preferences", preferences(30, 4))),
    }


def keep(artifact: Any, folder: Path) -> Any:
    """The artifact moved to where the module's other tests find it."""
    artifact.path.rename(folder)
    return type(artifact)(folder, artifact.metrics)


@pytest.fixture(scope="module")
def base(world: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model pre-trained on both languages, once for the module."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "work").mkdir()
    job = Job("base", folder / "out", folder / "work", 0, Execution(), Emitter("base", 0, lambda e: None), world)
    world["base"] = pretraining().run(job)
    return world["base"]


def pretraining(**changes: Any) -> Pretrain:
    given: dict[str, Any] = {
        "data": ["en", "zh"], "tokenizer": "tokenizer", "tokens": 20_000, "seq_len": 64,
        "model": {"hidden": 32, "layers": 2, "head_dim": 8, "context": 128},
        "train": {"batch_size": 8, "lr": 0.01, "log_every": 5},
        "held_out": {"en": "en", "zh": "zh"}, "held_out_bytes": "1kB",
    }  # fmt: skip
    return Pretrain(**{**given, **changes})


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in files_of(folder)}


def test_pretraining_measures_what_a_recipe_is_judged_by(base: Artifact) -> None:
    metrics = base.metrics
    for code in ("en", "zh"):
        assert metrics[f"bits_per_byte_{code}"] < 0.5 * metrics[f"untrained_bits_per_byte_{code}"]
        assert 0 < metrics[f"xz_bits_per_byte_{code}"] < 8 and 0 < metrics[f"ngram_bits_per_byte_{code}"] < 8
        assert metrics[f"held_out_bytes_{code}"] in range(997, 1001), "cut between two characters"
    assert metrics["steps"] == 40 and metrics["tokens"] == 40 * 8 * 64
    assert metrics["final_loss"] < 3 and metrics["tokens_per_second"] > 0
    model = AutoModelForCausalLM.from_pretrained(base.path)
    assert model.num_parameters() == metrics["parameters"] == metrics["trained_parameters"]
    assert model.config.max_position_embeddings == 128
    assert sorted(files_of(base.path)) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    json.dumps(metrics)


def test_the_same_stage_gives_the_same_bytes_whatever_the_batch_is_split_into(run: Run) -> None:
    small = pretraining(tokens=3000, held_out={}, train={"batch_size": 8, "dtype": "float32", "optimizer": "adamw"})
    first, second = run(small, "first"), run(small, "second")
    assert digests(first.path) == digests(second.path)
    split = run(small, "split", micro_batch=3)
    model, other = (AutoModelForCausalLM.from_pretrained(a.path) for a in (first, split))
    assert split.metrics["final_loss"] == pytest.approx(first.metrics["final_loss"], rel=1e-5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert float((a - b).norm().detach() / a.norm().detach()) < 1e-3


def test_full_fine_tuning_lowers_the_loss_on_held_out_answers(run: Run, base: Artifact, tmp_path: Path) -> None:
    stage = SFT(
        model="base", data=["chats"], held_out="chats_held", held_out_rows=10, train={"lr": 3e-3, "epochs": 4, **QUICK}
    )
    assert stage.output_kinds() == {"": Model}
    made = run(stage)
    assert type(made) is Model and made.metrics["rows"] == 60 and made.metrics["dropped_rows"] == 0
    assert made.metrics["answer_loss"] < 0.5 * made.metrics["answer_loss_before"]
    assert made.metrics["held_out_tokens"] > 20
    model = AutoModelForCausalLM.from_pretrained(made.path)
    assert set(model.generation_config.eos_token_id) == {0, 2}, "it stops at the end of a turn"


def test_adapters_from_sft_through_dpo_to_a_merged_model(
    run: Run, world: dict[str, Artifact], base: Artifact, heard: list[Event]
) -> None:
    lora = {"rank": 4, "alpha": 8}
    tuned = SFT(
        model="base", data=["chats"], held_out="chats_held", lora=lora, train={"lr": 0.02, "epochs": 4, **QUICK}
    )
    assert tuned.output_kinds() == {"": Adapter}
    world["chat"] = run(tuned, "chat")
    assert type(world["chat"]) is Adapter
    assert world["chat"].metrics["answer_loss"] < world["chat"].metrics["answer_loss_before"]
    config = json.loads((world["chat"].path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.path.resolve())
    assert "README.md" not in set(files_of(world["chat"].path))

    heard.clear()
    world["aligned"] = run(
        DirectPreferences(
            model="chat", data="prefs", held_out="prefs_held", lora=lora, train={"lr": 5e-3, "epochs": 3, **QUICK}
        ),
        "aligned",
    )
    metrics = world["aligned"].metrics
    assert metrics["pairs"] == 30 + 3 * 10, "three answers make three pairs"
    curve = [e.value for e in heard if e.name == "dpo"]
    assert metrics["accuracy"] > 0.8 and metrics["accuracy_low"] > 0.5 and curve[-1] < curve[0]
    assert {"longer", "likelier", "likelier_mean", "accuracy_en", "accuracy_zh"} <= set(metrics)

    merged = run(Merge(model="aligned"), "merged")
    assert merged.metrics["max_logprob_difference"] < 1e-3
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(merged.path)(ids).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained(world["aligned"].path)(ids).logits
    torch.testing.assert_close(whole, adapted, rtol=1e-3, atol=1e-4)

    with pytest.raises(FledgeError, match="keeps its form"):
        run(SFT(model="chat", data=["chats"], lora={"rank": 8}, train=QUICK), "other")


def test_full_dpo_starts_at_ln_2_and_an_adapter_can_become_a_whole_model(
    run: Run, world: dict[str, Artifact], base: Artifact, heard: list[Event]
) -> None:
    made = run(
        DirectPreferences(
            model="base", data="prefs", held_out="prefs_held", train={"lr": 1e-3, "epochs": 3, **QUICK, "log_every": 1}
        )
    )
    assert type(made) is Model and made.metrics["accuracy_low"] > 0.5
    assert next(e.value for e in heard if e.name == "dpo") == pytest.approx(0.6931471805599453, abs=1e-7)
    world["small"] = run(SFT(model="base", data=["chats"], lora={"rank": 2}, train={"steps": 2, **QUICK}), "small")
    whole = run(SFT(model="small", data=["chats"], train={"steps": 2, **QUICK}), "whole")
    assert type(whole) is Model and whole.metrics["trained_parameters"] == base.metrics["parameters"]


def test_a_reward_model_prefers_what_people_prefer(run: Run, base: Artifact) -> None:
    made = run(
        RewardModelling(model="base", data="prefs", held_out="prefs_held", train={"lr": 3e-3, "epochs": 4, **QUICK})
    )
    metrics = made.metrics
    assert type(made) is RewardModel
    assert metrics["accuracy"] > 0.8 and metrics["accuracy_low"] > 0.5 >= metrics["longer_low"]
    assert metrics["held_out_pairs"] == 22 + 3 * 8
    model = AutoModelForSequenceClassification.from_pretrained(made.path)
    assert model.config.num_labels == 1 and model.config.pad_token_id == 3


def test_what_cannot_be_learned_from_is_said(
    run: Run, world: dict[str, Artifact], base: Artifact, tmp_path: Path
) -> None:
    ties = [Preference((Message("user", "q"),), (Answer("a", 1), Answer("b", 1)))]
    world["ties"] = Preferences(write(tmp_path / "ties", "preferences", ties))
    world["empty"] = Conversations(write(tmp_path / "empty", "conversations", []))
    with pytest.raises(FledgeError, match="no pair in which one answer is better"):
        run(RewardModelling(model="base", data="ties", train=QUICK), "x")
    with pytest.raises(FledgeError, match="nothing to learn from"):
        run(SFT(model="base", data=["empty"], train=QUICK), "y")
    (problem,) = pretraining(model={"size": "1M", "context": 32}).check()
    assert "longer than the model's context" in problem.what


def test_defaults_of_a_stage_survive_a_partial_setting() -> None:
    assert SFT(model="m", data=["d"], train={"epochs": 3}).train.lr == 2e-5
    assert pretraining(train={"batch_size": 4}).train.optimizer == "muon"


def test_every_stage_measures_its_held_out_rows_on_the_way(run: Run, base: Artifact) -> None:
    watched = {"steps": 6, "evaluate_every": 2, "freeze": ["model.embed_tokens*"], **QUICK}
    stages: list[Any] = [
        pretraining(train={"batch_size": 8, "evaluate_every": 2}, tokens=3000),
        SFT(model="base", data=["chats"], held_out="chats_held", train=watched),
        RewardModelling(model="base", data="prefs", held_out="prefs_held", train=watched),
        DirectPreferences(model="base", data="prefs", held_out="prefs_held", train=watched),
    ]
    for number, stage in enumerate(stages):
        made = run(stage, f"watched{number}")
        assert made.metrics["best_step"] in (2, 4, 6), stage.use
        assert 0 < made.metrics["best_held_out_loss"] < 20
